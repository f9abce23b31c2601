"""What an update will do, and on which examples: schedules and the split by time."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from tests.support.updates import ARTEFACT, TASK, make_split, plan_for

from perfit_device import history
from perfit_device.history import HistoryItem
from perfit_device.training import update as updates
from perfit_shared.errors import InvalidData, InvalidInput


def test_every_epoch_sees_every_example_once() -> None:
    plan = plan_for(make_split())
    for epoch in range(plan.epochs):
        steps = range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
        assert sorted(row for step in steps for row in plan.batch(step)) == list(range(21))
    assert plan.batch(0) != plan.batch(plan.steps_per_epoch)


def test_nonsense_plans_are_refused() -> None:
    split = make_split()
    for changes in ({"epochs": 0}, {"batch_size": 0}, {"learning_rate": math.nan}, {"seed": -1}):
        with pytest.raises(InvalidInput):
            plan_for(split, **changes)


def test_short_histories_take_at_least_150_steps() -> None:
    """The demo's 77 examples took 30 steps at the artefact's figures, and learned next to nothing."""
    paper = replace(ARTEFACT, epochs=6, batch_size=16)
    assert updates.schedule(paper, 77) == (14, 7)  # 11 steps an epoch, 154 in all
    assert updates.schedule(paper, 4) == (150, 4)
    assert updates.schedule(paper, 3) == (150, 3)
    assert updates.schedule(paper, 20) == (30, 4)
    assert updates.schedule(paper, 1000) == (6, 16)
    assert updates.schedule(replace(paper, batch_size=2), 77) == (6, 2)
    # What the user says stays, and the other figure follows it.
    assert updates.schedule(paper, 77, epochs=2) == (2, 7)
    assert updates.schedule(paper, 77, batch_size=16) == (30, 16)
    assert updates.schedule(paper, 77, batch_size=500) == (150, 77)
    assert updates.schedule(paper, 77, epochs=1, batch_size=0) == (1, 0), "for Plan to refuse"
    assert updates.schedule(paper, 77, batch_size=0)[1] == 0


@pytest.mark.parametrize(("count", "sizes"), [(10, (4, 3, 3)), (20, (13, 3, 4)), (100, (70, 12, 18))])
def test_the_split_is_by_time(count: int, sizes: tuple[int, int, int]) -> None:
    split = (
        make_split(min(count, 28))
        if count < 28
        else history.split(
            [
                HistoryItem.make(TASK, {"text": f"text {n}", "title": "t"}, date=f"{1900 + n}")
                for n in range(count)
            ]
        )
    )
    assert (len(split.train), len(split.gate), len(split.test)) == sizes
    dates = [i.date for part in (split.train, split.gate, split.test) for i in part]
    assert dates == sorted(dates)


def test_an_explicit_test_part_stays_the_test() -> None:
    items = [
        HistoryItem.make(TASK, {"text": f"text {n}", "title": "t"}, part="test" if n < 5 else "")
        for n in range(45)
    ]
    split = history.split(items)
    assert (len(split.train), len(split.gate), len(split.test)) == (34, 6, 5)
    assert {i.part for i in split.test} == {"test"}
    with pytest.raises(InvalidData, match="at least 7"):
        history.split(items[:10])
