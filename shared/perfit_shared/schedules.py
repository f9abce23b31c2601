"""Personal training (PerFit, stage 2): how many steps, on which examples, at which rate, and what judges."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import ClassVar, Protocol

import numpy as np

from perfit_shared.errors import InvalidInput
from perfit_shared.optimizer import OptimizerConfig, learning_rate_at
from perfit_shared.splits import folds_for

__all__ = ["Figures", "Overrides", "PaperSchedule", "Schedule", "schedule_for"]

_LEAST_STEPS = 150  # of an update on a device, unless the user says otherwise
_LEAST_STEPS_IN_FOLDS = 75  # which cost three times as much each, for a history of up to half as many
_JUDGEMENTS = 12  # of a training, about
_POOLED = 50  # batches, at most, whose examples are sorted by length together


@dataclass(frozen=True)
class Schedule:
    """What training will do; two with equal schedules take equal steps. Raises InvalidInput.

    Epochs are judged on the examples held out behind those that train. Where these are too few to tell,
    on all: in each *fold* a copy of the training goes without one part of the examples, which judges it.
    """

    epochs: int
    learning_rate: float  # peak
    batch_size: int  # examples a step
    seed: int
    examples: int  # that train
    held_out: int = field(default=0, kw_only=True)  # the examples behind those
    folds: int = field(default=0, kw_only=True)

    name: ClassVar[str] = "device"

    def __post_init__(self) -> None:
        if not 1 <= self.epochs <= 1000:
            raise InvalidInput(f"epochs should be from 1 to 1000, not {self.epochs}")
        if not 1 <= self.batch_size <= 4096:
            raise InvalidInput(f"a batch size should be from 1 to 4096, not {self.batch_size}")
        if self.seed < 0:
            raise InvalidInput("a seed should not be negative")
        if not (math.isfinite(self.learning_rate) and 0 < self.learning_rate <= 10):
            raise InvalidInput("a learning rate should be above 0 and at most 10")
        if self.folds and not 2 <= self.folds <= self.examples:
            raise InvalidInput("folds should be at least 2, and at most as many as there are examples")

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.examples / self.batch_size)

    @property
    def steps(self) -> int:
        return self.epochs * self.steps_per_epoch

    @property
    def work(self) -> int:
        """Examples that all steps differentiate, those of the folds among them."""
        return self.epochs * sum(map(self.work_of, range(self.steps_per_epoch)))

    def work_of(self, step: int) -> int:
        """As `work`, of one step."""
        return sum(map(len, self.batches(step)))

    @property
    def judged(self) -> Sequence[range]:
        """The examples that judge epochs: those of each fold, or the ones held out."""
        if self.folds:
            ends = [fold * self.examples // self.folds for fold in range(self.folds + 1)]
            return [range(*part) for part in pairwise(ends)]
        return [range(self.examples, self.examples + self.held_out)] if self.held_out else []

    @property
    def judgement_epochs(self) -> int:
        """From one judgement to the next: of many epochs about twelve are judged."""
        return max(1, self.epochs // _JUDGEMENTS)

    @property
    def judgements(self) -> int:
        """Of all epochs, and of the start."""
        return 1 + math.ceil(self.epochs / self.judgement_epochs) if self.judged else 0

    def batch(self, step: int) -> list[int]:
        """Row indices of one step; every epoch is a permutation of its own."""
        epoch, index = divmod(step, self.steps_per_epoch)
        return self._order(epoch)[index * self.batch_size : (index + 1) * self.batch_size]

    def batches(self, step: int) -> list[list[int]]:
        """The rows of one step of the training, and of each fold: the epoch without its own part.

        All take equally many steps an epoch, so an epoch of one is an epoch of the others.
        """
        epoch, index = divmod(step, self.steps_per_epoch)
        found = [self.batch(step)]
        for part in self.judged if self.folds else ():
            rows = [row for row in self._order(epoch) if row not in part]
            start, end = (at * len(rows) // self.steps_per_epoch for at in (index, index + 1))
            found.append(rows[start : max(end, start + 1)])
        return found

    def _order(self, epoch: int) -> list[int]:
        rows: list[int] = np.random.default_rng([self.seed, epoch]).permutation(self.examples).tolist()
        return rows

    def rate(self, step: int) -> float:
        """The learning rate of one step, by `learning_rate_at`."""
        return learning_rate_at(step, self.optimizer())

    def optimizer(self) -> OptimizerConfig:
        return OptimizerConfig(self.learning_rate, self.steps, schedule=self.name)


@dataclass(frozen=True)
class PaperSchedule(Schedule):
    """As the paper trains, which is Hugging Face's trainer with `group_by_length`.

    An epoch's permutation is cut into pools of up to 50 batches, at least four of them; each pool is
    sorted by length, longest first, and the longest example of all comes first of all, so that memory
    runs out at once or never. The first step's rate is 0 (`learning_rate_at`).
    """

    lengths: tuple[int, ...]  # of each example, tokens of prompt and target

    name: ClassVar[str] = "paper"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "lengths", tuple(self.lengths))  # JSON has lists
        if len(self.lengths) != self.examples:
            raise InvalidInput(f"{len(self.lengths)} lengths of {self.examples} examples")

    def _order(self, epoch: int) -> list[int]:
        rows = super()._order(epoch)
        size = self.batch_size * max(1, min(self.examples // (4 * self.batch_size), _POOLED))
        pools = [rows[start : start + size] for start in range(0, len(rows), size)]
        order = [row for pool in pools for row in sorted(pool, key=lambda row: -self.lengths[row])]
        longest = order.index(max(order, key=lambda row: self.lengths[row]))
        order[0], order[longest] = order[longest], order[0]
        return order


class Figures(Protocol):
    """What a schedule starts from: an artefact, or a preset."""

    @property
    def epochs(self) -> int: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def learning_rate(self) -> float: ...


@dataclass(frozen=True)
class Overrides:
    """The user's own figures; None where the user gives none."""

    epochs: int | None = None
    batch_size: int | None = None
    learning_rate: float | None = None
    seed: int = 0


def schedule_for(
    name: str,
    figures: Figures,
    examples: int,
    overrides: Overrides = Overrides(),
    *,
    held_out: int = 0,
    lengths: Sequence[int] = (),
) -> Schedule:
    """The "paper" schedule or a "device" one of an update on so many examples. Raises InvalidInput.

    "paper" takes the figures as they stand, and needs the `lengths` of the examples in tokens. They
    are made for long histories; on a short one they end before much is learned. On the 77 training
    examples of the demo's Ravi 88 steps end at a test loss of 1.36, 154 at 0.93 and 220 at 0.80. So on
    a "device" a batch is at most a tenth of the examples, or 4 where that is more, and there are as
    many epochs as 150 steps take; the best one is kept. Overrides always win.

    `held_out` examples behind the others judge a device's epochs. Where they are too few to tell, all
    examples train, and judge in folds, which take half the steps.
    """
    on_device = name == Schedule.name
    folds = folds_for(held_out) if on_device else 0
    if folds:
        examples, held_out = examples + held_out, 0
    batch_size, epochs = overrides.batch_size, overrides.epochs
    if batch_size is None:
        batch_size = min(figures.batch_size, max(4, examples // 10)) if on_device else figures.batch_size
    batch_size = min(batch_size, examples)
    if epochs is None:
        steps_per_epoch = math.ceil(examples / max(1, batch_size))  # Schedule refuses a size below 1
        least = _LEAST_STEPS_IN_FOLDS if folds else _LEAST_STEPS if on_device else 0
        epochs = max(figures.epochs, math.ceil(least / steps_per_epoch))
    rate = figures.learning_rate if overrides.learning_rate is None else overrides.learning_rate
    if not on_device:
        return PaperSchedule(epochs, float(rate), batch_size, overrides.seed, examples, tuple(lengths))
    judges = {"held_out": held_out, "folds": folds}
    return Schedule(epochs, float(rate), batch_size, overrides.seed, examples, **judges)
