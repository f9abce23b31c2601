"""Time to first token of single asks, on an idle cloud and while two devices update on it."""

from __future__ import annotations

import argparse
import time
from threading import Event, Thread
from typing import Any

import common
import numpy as np
from updating import update
from workload import artefact_for, examples, prompts, uses

from perfit_cloud.engine.device_lock import DeviceLock
from perfit_cloud.engine.generation.factory import build_engine
from perfit_cloud.engine.gradients.scheduler import GradientScheduler
from perfit_cloud.engine.gradients.session import UpdateEngine
from perfit_cloud.engine.interface import Engine, GenerationSettings, ShiftUse
from perfit_cloud.model.base import BaseModel
from perfit_shared.training import Schedule
from perfit_shared.types import Sampling

__all__ = ["run"]

_DEVICES = 2
_ASKS = 20  # a turn, one after another
_NEW_TOKENS = 8
_KEEP_BYTES = 4 << 30


def run(base: BaseModel, args: argparse.Namespace) -> dict[str, Any]:
    """Engines are put together as `perfit-cloud serve` does."""
    artefact, device_lock = artefact_for(base), DeviceLock()
    engine = build_engine(base, {artefact.name: artefact}, GenerationSettings(), device_lock)
    queue = GradientScheduler(UpdateEngine(base, keep_bytes=_KEEP_BYTES, device_lock=device_lock))
    asked = prompts(base, 4 if args.small else _ASKS, 32, 64 if args.small else 256)
    whose = uses(artefact, len(asked), len(asked))
    waits: dict[str, list[list[float]]] = {"idle": [], "updating": []}

    def idle() -> float:
        waits["idle"].append(_ask_singly(engine, asked, whose))
        return float(np.percentile(waits["idle"][-1], 95))

    def device(number: int, stop: Event, steps: list[int]) -> None:
        """One update after another: 64 examples of about 60 tokens, 16 a step, four epochs."""
        pairs = examples(base, 64, 60, seed=number)
        schedule = Schedule(4, artefact.learning_rate, 16, seed=number, examples=len(pairs))
        while not stop.is_set():
            steps[number] += update(queue, artefact, pairs, schedule, stop=stop).step

    def updating() -> float:
        stop, steps = Event(), [0] * _DEVICES
        devices = [Thread(target=device, args=(i, stop, steps)) for i in range(_DEVICES)]
        for thread in devices:
            thread.start()
        while not all(steps):
            time.sleep(0.01)
        waits["updating"].append(_ask_singly(engine, asked, whose))
        stop.set()
        for thread in devices:
            thread.join()
        return float(np.percentile(waits["updating"][-1], 95))

    try:
        turns_of = common.interleaved(
            {"idle": idle, "updating": updating}, pairs=2 if args.small else args.pairs
        )
    finally:
        engine.stop()
        queue.close()
    ratio = common.ratio(turns_of["updating"], turns_of["idle"])
    counted = {side: np.concatenate(found[1:]) for side, found in waits.items()}
    found = {f"{side}_ttft_p{p}": float(np.percentile(w, p)) for side, w in counted.items() for p in (50, 95)}
    print(
        common.table(
            ["cloud", "first token, p50 s", "p95 s"],
            [[side, found[f"{side}_ttft_p50"], found[f"{side}_ttft_p95"]] for side in counted],
        )
    )
    print(f"p95 beside {_DEVICES} updates over idle, by turns of {len(asked)} asks: {ratio}")
    return {"asks_during_updates": {"model": base.name, **found, "p95_ratio": ratio.to_json()}}


def _ask_singly(engine: Engine, asked: list[list[int]], whose: list[ShiftUse]) -> list[float]:
    """Seconds to each first piece; the next ask waits for the end of the answer."""
    waits = []
    for prompt, use in zip(asked, whose, strict=True):
        begun = time.perf_counter()
        answer = engine.submit(prompt, use, Sampling(_NEW_TOKENS))
        next(answer)
        waits.append(time.perf_counter() - begun)
        for _ in answer:
            pass
    return waits
