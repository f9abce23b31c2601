"""What an update will do, and on which examples: schedules and the split by time."""

from __future__ import annotations

import math

import pytest
from tests.support.updates import TASK, make_split, plan_for

from perfit_device import history
from perfit_device.history import HistoryItem
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
