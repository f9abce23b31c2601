"""Serving: what another user for every request costs, beside the same engine without hooks, and peers.

    python scripts/bench/serving.py --model ../shared/models/newslm --json serving.json
    python scripts/bench/serving.py --model random-100m --json serving-100m.json

32 requests in flight, prompts of 32 to 256 random tokens, 64 new tokens each (no end of sequence),
greedy; LaMP-2M's preset (ranks 32/4, f7+l7, two layers). First the same requests of 1, 8 and 32
distinct users beside an engine with no hook registered; then those of 32 users beside

    static_generate   the library's `generate`, one batch padded on the left, no shift at all
    peft              mixed LoRA batches, r = 8 on q and v, 32 adapters, the same padded batch
    pyreft            one user after another, for it holds one shift at a time; a process of its own
                      (`make peers`), the same weights, tensors and token ids

Tokens a second are new tokens over the time from the first submit to the last token. The first table's
engines run side by side, a pass of each after one of the others', and each side's time is that of its
own passes: figures of one engine alone, which no change of the machine's speed can part. Peers cannot be
run so: whole runs of ours and theirs take turns. `peft_slowdown` is peft's time with mixed adapters over
its time with none, `slowdown_over_peft` is ours over that. Times to first token run from a request's
submit to its first piece, over all runs.

    --asks-during-updates   instead: time to first token of single asks, idle and beside two updates
    --scaling               instead: tokens a second and memory by users, prompt length and rank
    --profile               instead: where the time of one run goes
    --packing               instead: tokens a second with packed weights and with weights as they are
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import beside_updates
import common
import growth
import numpy as np
from asking import Run, ask_all, ask_in_step
from peers.library import Lora, Static
from peers.pyreft_process import PyreftServing, pyreft_for
from workload import Asked, artefact_for, load_model, parser, prompts, uses

from perfit_cloud.engine.generation.factory import build_engine
from perfit_cloud.engine.interface import Engine, GenerationSettings
from perfit_cloud.model.artefacts import Artefact
from perfit_cloud.model.base import BaseModel
from perfit_shared.types import Sampling

_WARM_UP = 1  # rounds that are not counted


@dataclass(frozen=True)
class Sizes:
    distinct: tuple[int, ...] = (1, 8, 32)  # users; the last is how many requests are in flight
    shortest: int = 32  # tokens of a prompt
    longest: int = 256
    new_tokens: int = 64

    @property
    def in_flight(self) -> int:
        return self.distinct[-1]


SMALL = Sizes(distinct=(1, 2, 4), shortest=15, longest=40, new_tokens=8)


class Side:
    """One engine and what it is asked. Called, it gives tokens a second of a run alone; its runs stay."""

    def __init__(self, engine: Engine, asked: list[Asked]) -> None:
        self.asked = asked
        self.engine = engine
        self.runs: list[Run] = []

    def __call__(self) -> float:
        self.runs.append(ask_all(self.engine, self.asked))
        return self.runs[-1].tokens_per_second

    @property
    def answers(self) -> list[list[int]]:
        """Of the last run."""
        return self.runs[-1].answers

    def speeds(self) -> list[float]:
        """Tokens a second of each counted run."""
        return [run.tokens_per_second for run in self.runs[_WARM_UP:]]

    def first(self, percentile: float) -> list[float]:
        """Of each counted run, a percentile of its requests' seconds to the first piece."""
        return [float(np.percentile(run.first, percentile)) for run in self.runs[_WARM_UP:]]

    def all_first(self, percentile: float) -> float:
        """Over all counted runs."""
        return float(np.percentile([s for run in self.runs[_WARM_UP:] for s in run.first], percentile))


class Bench:
    """A model with engines on it, with hooks and without, and the requests."""

    def __init__(self, base: BaseModel, sizes: Sizes) -> None:
        self._base, self._sizes = base, sizes
        self._artefact = artefact_for(base)
        self._prompts = prompts(base, sizes.in_flight, sizes.shortest, sizes.longest)
        self._engines = ExitStack()

    def close(self) -> None:
        self._engines.close()

    def rows(self, pairs: int) -> list[dict[str, Any]]:
        """Ours by distinct users, beside no hooks."""
        base = self._side(None, 1)
        sides = {count: self._side(self._artefact, count) for count in self._sizes.distinct}
        for _ in range(_WARM_UP + pairs):
            everyone = (base, *sides.values())
            runs = ask_in_step({str(i): (side.engine, side.asked) for i, side in enumerate(everyone)})
            for side, run in zip(everyone, runs.values(), strict=True):
                side.runs.append(run)
        made = []
        for count, side in sides.items():
            ratio = common.ratio(side.speeds(), base.speeds())
            waits = {p: common.ratio(side.first(p), base.first(p)) for p in (50, 95)}
            made.append(
                {
                    "model": self._base.name,
                    "distinct_users": count,
                    "in_flight": self._sizes.in_flight,
                    "tokens_per_second": float(np.median(side.speeds())),
                    "base_tokens_per_second": float(np.median(base.speeds())),
                    "ratio_to_base": ratio.median,
                    "ratio_interval": [ratio.low, ratio.high],
                    "ttft_p50": side.all_first(50),
                    "ttft_p95": side.all_first(95),
                    "base_ttft_p50": base.all_first(50),
                    "base_ttft_p95": base.all_first(95),
                    "ttft_p50_ratio": waits[50].to_json(),
                    "ttft_p95_ratio": waits[95].to_json(),
                }
            )
        return made

    def peers(self, pairs: int, ratio_to_base: float, *, without: Sequence[str]) -> dict[str, Any]:
        """Ours with every request another user, over each peer; intervals beside."""
        users = self._sizes.in_flight
        ours = self._side(self._artefact, users)
        static = Static(self._base, self._prompts, self._sizes.new_tokens)
        sides: dict[str, Callable[[], float]] = {"ours": ours, "static_generate": static}
        if "peft" not in without:
            lora = Lora(self._base, self._prompts, self._sizes.new_tokens)
            sides |= {"peft_base": lora.base, "peft": lora.mixed}
        with ExitStack() as stack:
            process = None if "pyreft" in without else pyreft_for(self._base)
            pyreft = None
            if process is not None:
                pyreft = PyreftServing(stack.enter_context(process), self._artefact, ours.asked)
                sides["pyreft"] = pyreft
            speeds = common.interleaved(sides, pairs=pairs, warm_up=_WARM_UP)
        ratios = {
            name: common.ratio(speeds["ours"], speeds[name])
            for name in ("peft", "static_generate", "pyreft")
            if name in speeds
        }
        slowdown = None
        if "peft" in speeds:
            ratios["peft_slowdown"] = common.ratio(speeds["peft_base"], speeds["peft"])
            slowdown = 1 / ratio_to_base / ratios["peft_slowdown"].median
        same = None
        if pyreft is not None:
            same = sum(a == b for a, b in zip(ours.answers, pyreft.answers, strict=True))
        return {
            **dict.fromkeys(("peft", "peft_slowdown", "pyreft")),
            **{name: ratio.median for name, ratio in ratios.items()},
            "slowdown_over_peft": slowdown,
            "intervals": {name: [ratio.low, ratio.high] for name, ratio in ratios.items()},
            "tokens_per_second": {name: float(np.median(speed)) for name, speed in speeds.items()},
            "same_answers_as_pyreft": same,
        }

    def _side(self, artefact: Artefact | None, distinct: int) -> Side:
        """An engine of its own, without hooks where there is no artefact, and the requests of these users."""
        settings = GenerationSettings(max_requests=self._sizes.in_flight, pack_weights=True)
        engine = build_engine(self._base, {artefact.name: artefact} if artefact else {}, settings)
        self._engines.callback(engine.stop)
        sampling = Sampling(self._sizes.new_tokens)
        whose = uses(artefact, distinct, len(self._prompts))
        return Side(engine, [(p, use, sampling) for p, use in zip(self._prompts, whose, strict=True)])


def main() -> None:
    made = parser(__doc__)
    mode = made.add_mutually_exclusive_group()
    for flag in _MODES:
        mode.add_argument(f"--{flag}", action="store_true")
    made.add_argument(
        "--without", action="append", choices=["peft", "pyreft"], default=[], help="a slow peer"
    )
    args = made.parse_args()
    base = load_model(args)
    run = next((run for flag, run in _MODES.items() if vars(args)[flag.replace("-", "_")]), _serve)
    common.finish(run(base, args), args.json)


def _serve(base: BaseModel, args: argparse.Namespace) -> dict[str, Any]:
    pairs = 2 if args.small else args.pairs
    bench = Bench(base, SMALL if args.small else Sizes())
    try:
        rows = bench.rows(pairs)
        _print_rows(rows)
        peers = bench.peers(pairs, rows[-1]["ratio_to_base"], without=args.without)
    finally:
        bench.close()
    print(
        common.table(
            ["peer", "its tokens/s", "ours over it [95 %]"],
            [
                [name, peers["tokens_per_second"][name], common.Ratio(peers[name], *peers["intervals"][name])]
                for name in ("static_generate", "peft", "pyreft")
                if peers[name] is not None
            ],
        )
    )
    if peers["peft"] is not None:
        slowdown = common.Ratio(peers["peft_slowdown"], *peers["intervals"]["peft_slowdown"])
        print(
            f"peft's time with mixed adapters over none: {slowdown}; ours over that: "
            f"{peers['slowdown_over_peft']:.3f}"
        )
    if peers["same_answers_as_pyreft"] is not None:
        print(f"answers that pyreft gives, too: {peers['same_answers_as_pyreft']} of {rows[0]['in_flight']}")
    return {"rows": rows, "peers": peers}


def _print_rows(rows: Sequence[dict[str, Any]]) -> None:
    print(
        common.table(
            ["users", "tokens/s", "of base [95 %]", "first token, p50 s", "of base", "p95 s", "of base"],
            [
                [
                    row["distinct_users"],
                    row["tokens_per_second"],
                    common.Ratio(row["ratio_to_base"], *row["ratio_interval"]),
                    row["ttft_p50"],
                    common.Ratio(*row["ttft_p50_ratio"]),
                    row["ttft_p95"],
                    common.Ratio(*row["ttft_p95_ratio"]),
                ]
                for row in rows
            ],
        )
    )
    ratios = [row["ratio_to_base"] for row in rows]
    print(
        f"spread over users, of the ratios to base: {(max(ratios) - min(ratios)) / max(ratios):.1%}\n",
        flush=True,
    )


_MODES = {
    "asks-during-updates": beside_updates.run,
    "scaling": growth.scaling,
    "profile": growth.profile,
    "packing": growth.packing,
}

if __name__ == "__main__":
    main()
