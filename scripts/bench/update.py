"""Personal updates: four epochs over 64 examples, beside pyreft's own trainer; and several devices at once.

    python scripts/bench/update.py --model ../shared/models/newslm --json update.json

f7+l7 on prompts of about 60 random tokens and l7 on prompts of about 200, targets of 4 to 16, one
layer, the middle one, batches of 16. Ours is what Adapt runs (the pass that fills the cache, steps
through the queue, the device's optimizer) without the wire; theirs is pyreft's ReftTrainerForCausalLM
in a process of its own (`make peers`), on the same weights, token ids and batches, without a
checkpoint or a log written. Both train one shift from the same tensors with φ₁ the identity: ours
carries it along, pyreft is spared it. Neither side's modules are counted, nor pyreft's reading of files.

`max_gradient_error`: of all tensors, the largest distance of our cached gradient from that of a full
pass over whole sequences by autograd, as a share of the latter's norm; in the model's dtype.

Then 1, 2, 4 and 8 devices at once, each with examples and tensors of its own, f7+l7 on 24 tokens:
steps a second of all together, caches being full.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from threading import Barrier, Thread
from typing import Any

import common
import numpy as np
from peers.pyreft_process import PyreftProcess, pyreft_for
from updating import update
from workload import Pair, artefact_for, examples, load_model, locations, parser, person

from perfit_cloud.engine.gradients.scheduler import GradientScheduler
from perfit_cloud.engine.gradients.session import GradientRequest, UpdateEngine
from perfit_cloud.engine.gradients.stateless import GradientEngine
from perfit_cloud.engine.interface import ShiftUse
from perfit_cloud.model.artefacts import Artefact
from perfit_cloud.model.base import BaseModel
from perfit_shared.optimizer import OptimizerConfig
from perfit_shared.shifts import ShiftTensors
from perfit_shared.training import Schedule, Training
from perfit_shared.types import Mode

_KEEP_BYTES = 4 << 30


@dataclass(frozen=True)
class Sizes:
    settings: tuple[tuple[str, int], ...] = (("f7+l7", 60), ("l7", 200))  # positions, prompt tokens
    examples: int = 64
    batch: int = 16
    epochs: int = 4
    devices: tuple[int, ...] = (1, 2, 4, 8)
    together: tuple[tuple[int, int], ...] = ((24, 16), (12, 4))  # several at once: prompt tokens, batch
    device_steps: int = 20


SMALL = Sizes(
    settings=(("f7+l7", 24), ("l7", 40)),
    examples=8,
    batch=4,
    epochs=1,
    devices=(1, 2),
    together=((12, 4),),
    device_steps=3,
)


class Bench:
    def __init__(self, base: BaseModel, sizes: Sizes) -> None:
        self._base, self._sizes = base, sizes
        self._queue = GradientScheduler(UpdateEngine(base, keep_bytes=_KEEP_BYTES))
        self._full = GradientEngine(base)

    def close(self) -> None:
        self._queue.close()
        self._full.close()

    def row(self, positions: str, tokens: int, *, pyreft: PyreftProcess | None, pairs: int) -> dict[str, Any]:
        """One row of the result."""
        sizes, artefact = self._sizes, self._artefact(positions)
        identity = ShiftTensors.identity(artefact.spec, artefact.spec.collective_rank, seed=1)
        artefact = replace(artefact, collective=identity)
        data = examples(self._base, sizes.examples, tokens)
        schedule = Schedule(sizes.epochs, artefact.learning_rate, sizes.batch, seed=0, examples=len(data))
        losses: dict[str, list[float]] = {}

        def ours() -> float:
            begun = time.perf_counter()
            training = update(self._queue, artefact, data, schedule)
            seconds = time.perf_counter() - begun
            losses["ours"] = _ends(training.losses, schedule)
            return seconds

        sides: dict[str, Callable[[], float]] = {"ours": ours}
        if pyreft is not None:
            process = pyreft
            command = _training(process, artefact, data, schedule)

            def theirs() -> float:
                done = process.ask("train", **command)
                losses["pyreft"] = _ends(done["losses"], schedule)
                return float(done["seconds"])

            sides["pyreft"] = theirs
        seconds = common.interleaved(sides, pairs=pairs)
        ratio = common.ratio(seconds["pyreft"], seconds["ours"]) if pyreft is not None else None
        return {
            "positions": positions,
            "prompt_tokens": tokens,
            "epochs": sizes.epochs,
            "ratio_to_pyreft": ratio and ratio.median,
            "ratio_interval": ratio and [ratio.low, ratio.high],
            "max_gradient_error": self._gradient_error(artefact, data),
            "seconds": {name: float(np.median(of)) for name, of in seconds.items()},
            "losses": losses,
        }

    def devices(self, pairs: int) -> list[dict[str, Any]]:
        """Steps a second of n devices together."""
        rows = []
        for tokens, batch in self._sizes.together:
            speeds = common.interleaved(
                {str(n): partial(self._together, n, tokens, batch) for n in self._sizes.devices}, pairs=pairs
            )
            for n in self._sizes.devices:
                ratio = common.ratio(speeds[str(n)], speeds[str(self._sizes.devices[0])])
                rows.append(
                    {
                        "n": n,
                        "prompt_tokens": tokens,
                        "batch": batch,
                        "steps_per_second": float(np.median(speeds[str(n)])),
                        "over_one": ratio.to_json(),
                    }
                )
        return rows

    def _artefact(self, positions: str) -> Artefact:
        """One layer, the middle one: half of the blocks lie above it."""
        return artefact_for(self._base, positions=positions, layers=(self._base.blocks // 2 - 1,))

    def _gradient_error(self, artefact: Artefact, data: list[Pair]) -> float:
        mine = person(artefact, 0)
        with self._queue.open(data, artefact) as session:
            cached = self._queue.submit(GradientRequest(session, range(len(data)), mine)).result().tensors
        full = self._full.gradient(data, ShiftUse(Mode.PERSONAL, artefact, mine)).tensors
        return max(
            float(np.linalg.norm(a - b) / np.linalg.norm(b))
            for (_, a), (_, b) in zip(cached.named(), full.named(), strict=True)
        )

    def _together(self, count: int, tokens: int, batch: int) -> float:
        sizes, artefact = self._sizes, self._artefact("f7+l7")
        ready = Barrier(count + 1)

        def device(number: int) -> None:
            data = examples(self._base, sizes.examples, tokens, seed=number)
            epochs = -(-sizes.device_steps * batch // len(data))
            schedule = Schedule(epochs, artefact.learning_rate, batch, number, len(data))
            training = Training.start(schedule, person(artefact, number))
            with self._queue.open(data, artefact) as session:
                ready.wait()
                while training.step < sizes.device_steps:
                    found = self._queue.submit(
                        GradientRequest(session, training.rows, training.tensors)
                    ).result()
                    training = training.stepped(found.loss, found.tensors)

        threads = [Thread(target=device, args=(number,)) for number in range(count)]
        for thread in threads:
            thread.start()
        ready.wait()
        begun = time.perf_counter()
        for thread in threads:
            thread.join()
        return count * sizes.device_steps / (time.perf_counter() - begun)


def _ends(losses: Sequence[float], schedule: Schedule) -> list[float]:
    """[the first step's, the mean over the last epoch], nats a token."""
    return [losses[0], float(np.mean(losses[-schedule.steps_per_epoch :]))]


def _training(
    process: PyreftProcess, artefact: Artefact, data: list[Pair], schedule: Schedule
) -> dict[str, Any]:
    """pyreft's command for the same update."""
    places = locations(artefact, [prompt for prompt, _ in data])
    return {
        "start": process.checkpoint([artefact.seed]),
        "examples": [[*pair, at] for pair, at in zip(data, places, strict=True)],
        "batches": [schedule.batch(step) for step in range(schedule.steps)],
        "learning_rate": schedule.learning_rate,
        "warm_up": OptimizerConfig.warm_up,
        "clip": OptimizerConfig.clip,
    }


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--devices", action="store_true", help="only several devices at once")
    args = made.parse_args()
    sizes, pairs = (SMALL, 2) if args.small else (Sizes(), args.pairs)
    base = load_model(args)
    bench = Bench(base, sizes)
    with ExitStack() as stack:
        stack.callback(bench.close)
        process = None if args.devices else pyreft_for(base)
        pyreft = stack.enter_context(process) if process is not None else None
        settings = () if args.devices else sizes.settings
        rows = [bench.row(*setting, pyreft=pyreft, pairs=pairs) for setting in settings]
        devices = bench.devices(pairs)
    print(
        common.table(
            [
                "positions",
                "prompt tokens",
                "ours, s",
                "pyreft, s",
                "pyreft over ours [95 %]",
                "gradient error",
                "loss, first and last",
                "its loss",
            ],
            [
                [
                    row["positions"],
                    row["prompt_tokens"],
                    row["seconds"]["ours"],
                    row["seconds"].get("pyreft", "–"),
                    common.Ratio(row["ratio_to_pyreft"], *row["ratio_interval"]) if pyreft else "–",
                    f"{row['max_gradient_error']:.1e}",
                    *(
                        " → ".join(f"{loss:.4f}" for loss in row["losses"].get(name, [])) or "–"
                        for name in ("ours", "pyreft")
                    ),
                ]
                for row in rows
            ],
        )
        + "\n"
    )
    print(
        common.table(
            ["prompt tokens", "batch", "devices at once", "steps/s of all", "over one [95 %]"],
            [
                [
                    row["prompt_tokens"],
                    row["batch"],
                    row["n"],
                    row["steps_per_second"],
                    common.Ratio(*row["over_one"]),
                ]
                for row in devices
            ],
        )
    )
    common.finish({"rows": rows, "devices": devices}, args.json)


if __name__ == "__main__":
    main()
