"""Schedules as numbers, and the loop that takes their steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pytest

from perfit_shared.errors import Diverged, InvalidInput
from perfit_shared.shifts import LayerShift, ShiftSpec, ShiftTensors
from perfit_shared.splits import split_sizes
from perfit_shared.training import Overrides, PaperSchedule, Schedule, Training, schedule_for, train

SPEC = ShiftSpec((0,), "l2", 1, 2, 8)
START = ShiftTensors.identity(SPEC, 2, 0)


@dataclass(frozen=True)
class Row:
    """Table 9's of news_categorize."""

    epochs: int = 6
    batch_size: int = 16
    learning_rate: float = 1e-4


def sizes(schedule: Schedule) -> tuple[int, int, int]:
    return schedule.epochs, schedule.batch_size, schedule.steps


@pytest.mark.parametrize(
    ("examples", "expected"),
    [(77, (14, 7, 154)), (4, (150, 4, 150)), (3, (150, 3, 150)), (20, (30, 4, 150)), (1000, (6, 16, 378))],
)
def test_a_device_takes_at_least_150_steps(examples: int, expected: tuple[int, int, int]) -> None:
    """The demo's 77 examples took 30 steps at the artefact's figures, and learned next to nothing."""
    assert sizes(schedule_for("device", Row(), examples)) == expected


def test_of_small_batches_a_device_takes_no_more_epochs() -> None:
    assert sizes(schedule_for("device", Row(batch_size=2), 77)) == (6, 2, 234)


def test_what_a_user_asks_for_stays_and_the_rest_follows() -> None:
    def asked(**overrides: int) -> tuple[int, int]:
        return sizes(schedule_for("device", Row(), 77, Overrides(**overrides)))[:2]

    assert asked(epochs=2) == (2, 7)
    assert asked(batch_size=16) == (30, 16)
    assert asked(batch_size=500) == (150, 77)
    with pytest.raises(InvalidInput, match="batch size"):
        asked(batch_size=0)
    assert schedule_for("device", Row(), 77, Overrides(learning_rate=0.5, seed=3)) == Schedule(
        14, 0.5, 7, 3, 77
    )


def test_the_paper_s_figures_stay_as_they_stand() -> None:
    lengths = list(range(77))
    schedule = schedule_for("paper", Row(epochs=4), 77, lengths=lengths)
    assert schedule == PaperSchedule(4, 1e-4, 16, 0, 77, tuple(lengths))
    assert schedule.steps == 20
    assert sizes(schedule_for("paper", Row(), 3, lengths=[1, 2, 3])) == (6, 3, 6)
    assert sizes(schedule_for("paper", Row(), 77, Overrides(2, 8), lengths=lengths))[:2] == (2, 8)


def test_rates_as_numbers() -> None:
    """12 steps warm up over 2: a tenth, rounded up."""
    device = Schedule(4, 0.1, 4, 0, 12)
    paper = PaperSchedule(4, 0.1, 4, 0, 12, lengths=(1,) * 12)
    ours = [device.rate(step) for step in range(12)]
    np.testing.assert_allclose(ours[:4], [0.05, 0.1, 0.1 * 10 / 11, 0.1 * 9 / 11])
    np.testing.assert_allclose(ours[-1], 0.1 / 11)
    theirs = [paper.rate(step) for step in range(12)]
    np.testing.assert_allclose(theirs[:4], [0, 0.05, 0.1, 0.09])
    np.testing.assert_allclose(theirs[-1], 0.01)


@pytest.mark.parametrize(
    ("count", "apart", "plain"),
    [(10, (7, 3, 0), (4, 3, 3)), (20, (17, 3, 0), (13, 3, 4)), (100, (85, 15, 0), (70, 12, 18))],
)
def test_sizes_of_a_split(count: int, apart: tuple[int, int, int], plain: tuple[int, int, int]) -> None:
    assert split_sizes(count, test_apart=True) == apart
    assert split_sizes(count, test_apart=False) == plain


# -- the loop ----------------------------------------------------------------------------------------

Asked = Mapping[int, Training[Schedule]]


def quadratic(tensors: ShiftTensors, goal: float) -> tuple[float, ShiftTensors]:
    """Loss and gradient, lowest where the bias is `goal`."""
    shift = tensors.layers[0]
    off = shift.bias - np.float32(goal)
    zero = np.zeros_like(shift.rotation)
    return float((off**2).mean()), ShiftTensors({0: LayerShift(zero, zero.copy(), 2 * off / off.size)})


class Source:
    """Answers, and writes down what it was asked for."""

    def __init__(self, goals: Sequence[float], held_out: float = 0.0) -> None:
        self._goals, self._held_out = goals, held_out
        self.log: list[tuple[str, list[int]]] = []

    def gradients(self, asked: Asked) -> Callable[[], list[tuple[float, ShiftTensors]]]:
        self.log.append(("gradients", list(asked)))
        return lambda: [quadratic(each.tensors, self._goals[i]) for i, each in asked.items()]

    def losses(self, asked: Asked) -> Callable[[], list[float]]:
        self.log.append(("losses", list(asked)))
        return lambda: [quadratic(each.tensors, self._held_out)[0] for each in asked.values()]


def started(*counts: int, judge_start: bool = False) -> list[Training[Schedule]]:
    return [Training.start(Schedule(2, 0.1, 4, 0, n), START, judge_start=judge_start) for n in counts]


def test_people_step_together_until_each_is_through() -> None:
    source, trainings = Source([1.0, 2.0]), started(8, 4)
    rounds = list(train(trainings, gradients=source.gradients))
    assert rounds == [[0, 1], [0, 1], [0], [0]]
    assert [each.step for each in trainings] == [4, 2]
    alone = started(8)
    list(train(alone, gradients=Source([1.0]).gradients))
    assert alone[0].outcome.digest() == trainings[0].outcome.digest() == trainings[0].tensors.digest()


def test_the_next_round_is_asked_for_before_one_is_told_of() -> None:
    source, trainings = Source([1.0]), started(4)
    for told, _ in enumerate(train(trainings, gradients=source.gradients), 1):
        assert trainings[0].step == told
        assert len(source.log) == min(told + 1, 2)


def test_epochs_are_judged_while_others_step() -> None:
    source, trainings = Source([1.0, 1.0]), started(8, 4)
    list(train(trainings, gradients=source.gradients, losses=source.losses))
    assert source.log == [
        ("gradients", [0, 1]),
        ("gradients", [0]),
        ("losses", [1]),
        ("gradients", [1]),
        ("losses", [0]),
        ("gradients", [0]),
        ("losses", [1]),
        ("gradients", [0]),
        ("losses", [0]),
    ]
    assert [each.best is not None for each in trainings] == [True, True]


def test_no_epoch_is_the_best_one_that_is_no_better_than_the_start() -> None:
    away = Source([1.0])  # held-out examples want the bias to stay where it is
    trainings = started(4, judge_start=True)
    list(train(trainings, gradients=away.gradients, losses=away.losses))
    assert trainings[0].outcome.digest() == START.digest() != trainings[0].tensors.digest()
    towards = Source([1.0], held_out=1.0)
    trainings = started(4, judge_start=True)
    list(train(trainings, gradients=towards.gradients, losses=towards.losses))
    assert trainings[0].outcome.digest() == trainings[0].tensors.digest()


def test_a_loss_that_is_no_number_names_its_training_and_keeps_the_others() -> None:
    trainings = started(4, 4, 4)
    with pytest.raises(Diverged, match=r"at step 1; try --lr 0\.033") as caught:
        list(train(trainings, gradients=Source([1.0, float("nan"), 1.0]).gradients))
    assert caught.value.index == 1
    assert [each.step for each in trainings] == [1, 0, 0]
