"""Schedules as numbers, and the loop that takes their steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pytest

from perfit_shared.errors import Diverged, InvalidInput
from perfit_shared.mixes import between
from perfit_shared.shifts import LayerShift, ShiftSpec, ShiftTensors
from perfit_shared.splits import split_sizes
from perfit_shared.training import Overrides, PaperSchedule, Request, Schedule, Training, schedule_for, train
from perfit_shared.types import Score
from perfit_shared.validation import Comparison, chosen_by_others

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
    """A device's grow, then decay; the paper's 12 steps warm up over 2: a tenth, rounded up."""
    device = Schedule(4, 0.1, 4, 0, 12)
    paper = PaperSchedule(4, 0.1, 4, 0, 12, lengths=(1,) * 12)
    ours = [device.rate(step) for step in range(12)]
    growing = [0.01 * 10 ** (step / 6) for step in range(7)]
    np.testing.assert_allclose(ours, [*growing, *(0.1 * left / 6 for left in range(5, 0, -1))])
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


def quadratic(tensors: ShiftTensors, goal: float) -> tuple[float, ShiftTensors]:
    """Loss and gradient, lowest where the bias is `goal`."""
    shift = tensors.layers[0]
    off = shift.bias - np.float32(goal)
    zero = np.zeros_like(shift.rotation)
    return float((off**2).mean()), ShiftTensors({0: LayerShift(zero, zero.copy(), 2 * off / off.size)})


class Source:
    """Answers, and writes down what it was asked for."""

    def __init__(self, goals: Sequence[float], held_out: float | Callable[[int], float] = 0.0) -> None:
        """Where each training's examples want the bias, and where a held-out row does."""
        self._goals = goals
        self._held_out = held_out if callable(held_out) else lambda row: held_out
        self.log: list[tuple[str, list[int]]] = []
        self.rows: list[list[int]] = []  # of the requests for gradients
        self.scored: list[list[int]] = []

    def gradients(self, asked: Sequence[Request]) -> Callable[[], list[tuple[float, ShiftTensors]]]:
        self.log.append(("gradients", [each.owner for each in asked]))
        self.rows += [list(each.rows) for each in asked]
        goals = [self._goals[each.owner] + sum(each.rows) / len(each.rows) / 50 for each in asked]
        return lambda: [quadratic(each.tensors, goal) for each, goal in zip(asked, goals, strict=True)]

    def losses(self, asked: Sequence[Request]) -> Callable[[], list[list[Score]]]:
        self.log.append(("losses", [each.owner for each in asked]))
        self.scored += [list(each.rows) for each in asked]
        return lambda: [
            [Score(-quadratic(each.tensors, self._held_out(row))[0], 1) for row in each.rows]
            for each in asked
        ]


def started(*counts: int, held_out: int = 0, folds: int = 0, epochs: int = 2) -> list[Training[Schedule]]:
    schedules = [Schedule(epochs, 0.1, 4, 0, n, held_out=held_out, folds=folds) for n in counts]
    return [Training.start(schedule, START) for schedule in schedules]


def run(source: Source, trainings: list[Training[Schedule]]) -> list[list[int]]:
    return list(train(trainings, gradients=source.gradients, losses=source.losses))


def test_people_step_together_until_each_is_through() -> None:
    source, trainings = Source([1.0, 2.0]), started(8, 4)
    assert run(source, trainings) == [[0, 1], [0, 1], [0], [0]]
    assert [each.step for each in trainings] == [4, 2]
    alone = started(8)
    run(Source([1.0]), alone)
    outcome = alone[0].outcome(START)
    assert outcome is not None
    assert outcome.digest() == trainings[0].tensors.digest() == alone[0].tensors.digest()


def test_the_next_round_is_asked_for_before_one_is_told_of() -> None:
    source, trainings = Source([1.0]), started(4)
    rounds = train(trainings, gradients=source.gradients, losses=source.losses)
    for told, _ in enumerate(rounds, 1):
        assert trainings[0].step == told
        assert len(source.log) == min(told + 1, 2)


def test_epochs_are_judged_while_others_step() -> None:
    source, trainings = Source([1.0, 1.0], held_out=1.0), started(8, 4, held_out=3)
    run(source, trainings)
    assert source.log == [
        ("losses", [0, 1]),
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
    assert source.scored[:2] == [[8, 9, 10], [4, 5, 6]]
    assert [each.best is not None for each in trainings] == [True, True]


def test_no_epoch_is_the_best_one_that_is_no_better_than_the_start() -> None:
    trainings = started(4, held_out=3)
    run(Source([1.0]), trainings)  # held-out examples want the bias to stay where it is
    assert trainings[0].outcome(START) is None and trainings[0].best is None
    assert trainings[0].ending(START) is START


def test_an_update_ends_three_quarters_of_the_way_to_the_best_epoch() -> None:
    trainings = started(4, held_out=3)
    run(Source([1.0], held_out=1.0), trainings)
    assert trainings[0].best is not None and trainings[0].best.digest() == trainings[0].tensors.digest()
    outcome, moved = trainings[0].outcome(START), trainings[0].tensors.layers[0].bias
    assert outcome is not None and abs(moved).min() > 0.05
    np.testing.assert_allclose(outcome.layers[0].bias, 0.75 * moved, rtol=1e-6)
    outcome.check(SPEC, 2)


def test_a_gain_that_chance_explains_is_none() -> None:
    """Of twelve held-out examples two want what is learned, of three two."""
    mixed = started(4, held_out=12)
    run(Source([1.0], held_out=lambda row: 1.0 if row in (4, 8) else 0.0), mixed)
    assert mixed[0].best is not None and mixed[0].comparison.gain > 0
    assert mixed[0].outcome(START) is None
    most = started(4, held_out=3)
    run(Source([1.0], held_out=lambda row: 0.04 if row == 4 else 1.0), most)
    assert most[0].outcome(START) is not None


def test_every_fold_goes_without_the_part_that_judges_it() -> None:
    source, trainings = Source([1.0], held_out=1.0), started(10, folds=3)
    run(source, trainings)
    parts = [[0, 1, 2], [3, 4, 5], [6, 7, 8, 9]]
    assert source.scored == 3 * parts  # the start and two epochs
    epoch = source.rows[: 4 * 3]  # three steps of the training and its folds
    assert sorted(row for rows in epoch[::4] for row in rows) == list(range(10))
    for fold, part in enumerate(parts, 1):
        seen = sorted(row for rows in epoch[fold::4] for row in rows)
        assert seen == [row for row in range(10) if row not in part]
    assert trainings[0].schedule.work == 2 * (10 + 7 + 7 + 6) == sum(map(len, source.rows))


def test_folds_choose_the_epoch_of_a_training_that_takes_the_steps_it_would_take_alone() -> None:
    trainings = started(10, folds=3)
    run(Source([1.0], held_out=1.0), trainings)
    alone = started(10)
    run(Source([1.0]), alone)
    best, outcome = trainings[0].best, trainings[0].outcome(START)
    assert best is not None and best.digest() == alone[0].tensors.digest()
    assert outcome is not None and outcome.digest() == between(START, best, 0.75).digest()
    early = started(10, folds=3, epochs=6)
    run(Source([1.0], held_out=0.35), early)  # the bias passes it on its way
    assert 0 < early[0].best_step < early[0].step and early[0].best is not None
    outcome = early[0].outcome(START)
    assert outcome is not None and outcome.digest() == between(START, early[0].best, 0.75).digest()
    assert early[0].best.digest() != early[0].tensors.digest()


def test_it_ends_a_third_of_all_epochs_after_the_best() -> None:
    trainings = started(4, held_out=3, epochs=10)
    run(Source([1.0]), trainings)
    assert (trainings[0].best_step, trainings[0].step) == (0, 4)


def test_of_many_epochs_twelve_are_judged() -> None:
    source, trainings = Source([50.0], held_out=50.0), started(4, held_out=3, epochs=38)
    run(source, trainings)
    assert len(source.scored) == 1 + 12 + 1  # the start, every third, the last


def state(training: Training[Schedule]) -> tuple[object, ...]:
    """All but the clock."""
    tensors = [each.tensors.digest() for each in (training.track, *training.folds)]
    best = training.best and training.best.digest()
    scores = (training.judgements, training.best_step)
    return training.schedule, training.losses, tensors, best, scores


@pytest.mark.parametrize("stop", range(1, 6))
def test_folds_resume_exactly(stop: int) -> None:
    straight = started(10, folds=3)
    run(Source([1.0], held_out=1.0), straight)
    source, trainings = Source([1.0], held_out=1.0), started(10, folds=3)
    rounds = train(trainings, gradients=source.gradients, losses=source.losses)
    for _ in range(stop):
        next(rounds, None)
    again = [Training.from_bytes(trainings[0].to_bytes(), Schedule)]
    assert state(again[0]) == state(trainings[0])
    run(Source([1.0], held_out=1.0), again)
    assert state(again[0]) == state(straight[0])


def test_a_loss_that_is_no_number_names_its_training_and_keeps_the_others() -> None:
    trainings = started(4, 4, 4)
    with pytest.raises(Diverged, match=r"at step 1; try --lr 0\.033") as caught:
        run(Source([1.0, float("nan"), 1.0]), trainings)
    assert caught.value.index == 1
    assert [each.step for each in trainings] == [1, 0, 0]


# -- what is chance --------------------------------------------------------------------------------


def test_no_example_chooses_the_epoch_that_it_judges() -> None:
    losses = ([4] * 6, [1, 1, 4, 4, 4, 4], [3] * 6)
    start, first, second = ([Score(-loss, 1) for loss in each] for each in losses)
    found = chosen_by_others([start, first, second])
    assert found == second[:2] + first[2:], "the first two would choose the first, as the others do"
    assert chosen_by_others([start]) == start
    assert chosen_by_others([start, first]) == start[:2] + first[2:], "nobody else gained"


def test_what_few_examples_choose_for_themselves_is_no_gain() -> None:
    """Each third gains at an epoch of its own, and at the best one the mean is twice its error."""
    training = started(4, held_out=6, epochs=3)[0]
    for losses in ([4] * 6, [1, 1, 4, 4, 5, 4], [4, 4.1, 2, 1.5, 4, 4], [4, 4, 4, 4.5, 1.5, 2]):
        training = training.judge([Score(-loss, 1) for loss in losses])
        gradient = quadratic(training.tensors, 1.0)
        training = training if training.done else training.stepped(*gradient)
    assert training.best is not None and training.best_step == 1
    own = Comparison(training.judgements[0].scores, training.judgements[1].scores)
    assert own.is_better
    assert not training.comparison.is_better and training.outcome(START) is None


def test_gain_and_error_as_numbers() -> None:
    before = [Score(-4.0, 2), Score(-6.0, 2), Score(-2.0, 4)]
    after = [Score(-3.0, 2), Score(-3.0, 2), Score(-3.0, 4)]
    found = Comparison(before, after)  # 1, 3 and -1 nats: mean 1, spread 2
    assert found.gain == pytest.approx(3 / 8)
    assert found.error == pytest.approx(2 / 3**0.5 * 3 / 8)
    assert not found.is_better and not found.is_worse
    assert Comparison(before[:2], after[:2]).is_better
    assert Comparison(after[:2], before[:2]).is_worse
    assert not Comparison(before[:1], after[:1]).is_better, "one example tells nothing"
    assert not Comparison(before, before).is_better and not Comparison(before, before).is_worse


def test_a_small_gate_gives_way_to_folds_of_all_examples() -> None:
    row = Row(batch_size=4)
    large, small = (schedule_for("device", row, 10 * n - n, held_out=n) for n in (10, 9))
    assert (large.examples, large.held_out, large.folds) == (90, 10, 0)
    assert (small.examples, small.held_out, small.folds) == (90, 0, 3)
    assert schedule_for("paper", row, 5, held_out=0, lengths=[1] * 5).folds == 0
