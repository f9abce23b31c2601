"""An update whose gradients come from a quadratic in this process."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np

from perfit_device import history
from perfit_device.cloud.codec import Artefact
from perfit_device.cloud.retry import RetryPolicy
from perfit_device.history import HistoryItem, Split
from perfit_device.training.update import Plan, Source, Update, UpdateSettings
from perfit_device.vault.store import Vault
from perfit_shared.shifts import LayerShift, ShiftSpec, ShiftTensors
from perfit_shared.tasks import TASKS
from perfit_shared.types import Score

SPEC = ShiftSpec(layers=(1,), positions="l7", collective_rank=4, personal_rank=3, hidden_size=12)
TASK = TASKS["news_headline"]
ARTEFACT = Artefact("news_headline", "v1", SPEC, TASK, 0.02, 4, 4)
Answer = tuple[float, int, ShiftTensors]
SEED = ShiftTensors.identity(SPEC, SPEC.personal_rank, 0)
NO_WAIT = RetryPolicy(give_up=1.0, sleep=lambda seconds: None, clock=iter(np.arange(0, 1e6, 0.1)).__next__)


@functools.cache
def make_split(count: int = 30) -> Split:
    items = [
        HistoryItem.make(TASK, {"text": f"text {n}", "title": f"t {n}"}, date=f"2024-01-{n + 1:02}")
        for n in range(count)
    ]
    return history.split(items)


def pull(item: HistoryItem) -> float:
    return 0.3 + len(item.fields["text"]) / 100 + int(item.fields["text"].split()[1]) / 500


def quadratic(items: Sequence[HistoryItem], tensors: ShiftTensors) -> Answer:
    goal, shift = np.float32(np.mean([pull(i) for i in items])), tensors.layers[1]
    parts = (shift.rotation - shift.source, shift.source - goal, shift.bias - goal)
    loss = sum(float((part**2).mean()) for part in parts)
    return loss, len(items), ShiftTensors({1: LayerShift(*(2 * p / p.size for p in parts))})


def gradient(rows: Sequence[int], tensors: ShiftTensors) -> Callable[[], Answer]:
    items = [*make_split().train, *make_split().gate]
    return lambda: quadratic([items[row] for row in rows], tensors)


def scored(rows: Sequence[int], loss: Callable[[int], float]) -> list[Score]:
    """Of one token each."""
    return [Score(-loss(row), 1) for row in rows]


def evaluate(rows: Sequence[int], tensors: ShiftTensors) -> Callable[[], list[Score]]:
    items = [*make_split().train, *make_split().gate]
    return lambda: scored(rows, lambda row: quadratic([items[row]], tensors)[0])


def plan_for(split: Split, **changes: Any) -> Plan:
    values: dict[str, Any] = {
        "epochs": 4,
        "learning_rate": 0.02,
        "batch_size": 4,
        "seed": 0,
        "fresh": False,
        "history": split.digest(),
        "version": "v1",
        "examples": len(split.train),
        "held_out": len(split.gate),
    }
    return Plan(**(values | changes))


def prepared(vault: Vault, *, plan: Plan | None = None, **changes: Any) -> Update:
    """An update of a quadratic; `changes` are those of its start, its source and its settings."""
    start = changes.pop("start", SEED)
    source = Source(changes.pop("gradient", gradient), changes.pop("evaluate", evaluate))
    settings = UpdateSettings(**({"retry_policy": NO_WAIT, "checkpoint_seconds": 0.0} | changes))
    plan = plan or plan_for(make_split())
    return Update(
        lambda: nullcontext(vault), "cloud", ARTEFACT, plan, start=start, source=source, settings=settings
    )
