"""Personal training (PerFit, stage 2): by which schedule, and the one loop that takes the steps.

Whoever computes the gradients calls it: a device over the wire, the research pipeline and the trials
of learning rates in process.

    schedule = schedule_for("device", artefact, len(examples))
    trainings = [Training.start(schedule, tensors)]
    for stepped in train(trainings, gradients=…, losses=…):
        …                     # progress, checkpoints, a stop

A `Training` is never changed, so an interrupt between two lines leaves the old one or the new one.
The order of examples is a function of seed and epoch, so a resumed run takes the very steps that an
uninterrupted one would have taken.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, Generic, Protocol, Self, TypeVar

import numpy as np
import safetensors
import safetensors.numpy

from perfit_shared.errors import Diverged, InvalidData, InvalidInput, PerfitError, UpdateFailed
from perfit_shared.optimizer import OptimizerConfig, StiefelAdamW, learning_rate_at
from perfit_shared.shifts import ShiftTensors

__all__ = ["Figures", "Overrides", "PaperSchedule", "Schedule", "Training", "schedule_for", "train"]

_LEAST_STEPS = 150  # of an update on a device, unless the user says otherwise
_POOLED = 50  # batches, at most, whose examples are sorted by length together


# -- schedules -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Schedule:
    """What training will do; two with equal schedules take equal steps. Raises InvalidInput."""

    epochs: int
    learning_rate: float  # peak
    batch_size: int  # examples a step
    seed: int
    examples: int

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

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.examples / self.batch_size)

    @property
    def steps(self) -> int:
        return self.epochs * self.steps_per_epoch

    def batch(self, step: int) -> list[int]:
        """Row indices of one step; every epoch is a permutation of its own."""
        epoch, index = divmod(step, self.steps_per_epoch)
        return self._order(epoch)[index * self.batch_size : (index + 1) * self.batch_size]

    def _order(self, epoch: int) -> list[int]:
        rows: list[int] = np.random.default_rng([self.seed, epoch]).permutation(self.examples).tolist()
        return rows

    def rate(self, step: int) -> float:
        """The learning rate of one step: linear warm-up over a tenth of all, then linear decay."""
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
    lengths: Sequence[int] = (),
) -> Schedule:
    """The "paper" schedule or a "device" one of an update on so many examples. Raises InvalidInput.

    "paper" takes the figures as they stand, and needs the `lengths` of the examples in tokens. They
    are made for long histories; on a short one they end before much is learned. On the 77 training
    examples of the demo's Ravi 88 steps end at a test loss of 1.36, 154 at 0.93 and 220 at 0.80. So on
    a "device" a batch is at most a tenth of the examples, or 4 where that is more, and there are as
    many epochs as 150 steps take; the gate keeps the best one. Overrides always win.
    """
    on_device = name == Schedule.name
    batch_size, epochs = overrides.batch_size, overrides.epochs
    if batch_size is None:
        batch_size = min(figures.batch_size, max(4, examples // 10)) if on_device else figures.batch_size
    batch_size = min(batch_size, examples)
    if epochs is None:
        steps_per_epoch = math.ceil(examples / max(1, batch_size))  # Schedule refuses a size below 1
        epochs = max(figures.epochs, math.ceil(_LEAST_STEPS / steps_per_epoch) if on_device else 0)
    rate = figures.learning_rate if overrides.learning_rate is None else overrides.learning_rate
    schedule = Schedule(epochs, float(rate), batch_size, overrides.seed, examples)
    return schedule if on_device else PaperSchedule(**asdict(schedule), lengths=tuple(lengths))


# -- training ------------------------------------------------------------------------------------

S = TypeVar("S", bound=Schedule)


@dataclass(frozen=True)
class Training(Generic[S]):
    """Where a run stands: tensors, moments, losses, and the best epoch where epochs are judged."""

    schedule: S
    tensors: ShiftTensors
    optimizer: StiefelAdamW
    losses: tuple[float, ...] = ()  # by step, nats a token
    seconds: float = 0.0  # the caller's clock
    judged: int = 0  # the step, at an epoch's end, that held-out examples were last measured at
    best_loss: float = math.inf  # of the best epoch so far on those, nats a token
    best: ShiftTensors | None = None

    @classmethod
    def start(cls, schedule: S, tensors: ShiftTensors, *, judge_start: bool = False) -> Self:
        """With `judge_start` no epoch is the best one that is no better than `tensors`."""
        judged = -1 if judge_start else 0
        return cls(schedule, tensors, StiefelAdamW(schedule.optimizer()), judged=judged)

    @property
    def outcome(self) -> ShiftTensors:
        """The best epoch's tensors, or the last ones where none was judged."""
        return self.tensors if self.best is None else self.best

    @property
    def step(self) -> int:
        """Steps done."""
        return len(self.losses)

    @property
    def done(self) -> bool:
        return self.step >= self.schedule.steps

    @property
    def rows(self) -> list[int]:
        """The examples of the next step."""
        return self.schedule.batch(self.step)

    @property
    def at_epoch_end(self) -> bool:
        """Whether an epoch ended here that `judge` has not seen."""
        return self.step > self.judged and self.step % self.schedule.steps_per_epoch == 0

    def stepped(self, loss: float, gradient: ShiftTensors, *, seconds: float = 0.0) -> Self:
        """After one step. Raises UpdateFailed when loss or gradient are no numbers."""
        if not math.isfinite(loss) or not math.isfinite(gradient.norm()):
            raise UpdateFailed(
                f"the loss is no longer a number at step {self.step + 1}; "
                f"try --lr {self.schedule.learning_rate / 3:.2g}"
            )
        optimizer = self.optimizer.copy()
        tensors = optimizer.step(self.tensors, gradient)
        return replace(
            self,
            tensors=tensors,
            optimizer=optimizer,
            losses=(*self.losses, loss),
            seconds=self.seconds + seconds,
        )

    def judge(self, loss: float) -> Self:
        """After measuring held-out examples at an epoch's end; keeps the best epoch's tensors.

        A later epoch may have learned the training examples by heart.
        """
        if loss < self.best_loss:
            return replace(self, judged=self.step, best_loss=loss, best=self.tensors)
        return replace(self, judged=self.step)

    # -- bytes ---------------------------------------------------------------------------------

    def to_bytes(self) -> bytes:
        """All of it, exactly."""
        header = {
            "plan": asdict(self.schedule),
            "losses": self.losses,
            "seconds": self.seconds,
            "judged": self.judged,
            "best_loss": self.best_loss,
        }
        parts = [json.dumps(header).encode(), self.tensors.to_bytes(), self.optimizer.to_bytes()]
        if self.best is not None:
            parts.append(self.best.to_bytes())
        return b"".join(item for part in parts for item in (len(part).to_bytes(8, "big"), part))

    @classmethod
    def from_bytes(cls, data: bytes, schedule: type[S]) -> Self:
        """Raises InvalidData."""
        try:
            parts, at = [], 0
            while at < len(data):
                start = at + 8
                at = start + int.from_bytes(data[at:start], "big")
                parts.append(data[start:at])
            header: dict[str, Any] = json.loads(parts[0])
            return cls(
                schedule=schedule(**header["plan"]),
                tensors=ShiftTensors.from_named(safetensors.numpy.load(parts[1])),
                optimizer=StiefelAdamW.from_bytes(parts[2]),
                losses=tuple(header["losses"]),
                seconds=header["seconds"],
                judged=header["judged"],
                best_loss=header["best_loss"],
                best=ShiftTensors.from_named(safetensors.numpy.load(parts[3])) if len(parts) > 3 else None,
            )
        except (
            PerfitError,
            ValueError,
            KeyError,
            TypeError,
            IndexError,
            safetensors.SafetensorError,
        ) as error:
            raise InvalidData("not the state of a training run") from error


# Each takes the trainings that need an answer, by their index, and sends their requests. The result waits
# for the answers.
Gradients = Callable[[Mapping[int, Training[S]]], Callable[[], Sequence[tuple[float, ShiftTensors]]]]
Losses = Callable[[Mapping[int, Training[S]]], Callable[[], Sequence[float]]]


def train(
    trainings: list[Training[S]], *, gradients: Gradients[S], losses: Losses[S] | None = None
) -> Iterator[list[int]]:
    """Take all trainings to their end, a step of each in every round; yields which took one.

    `gradients` gives mean loss and gradient over a training's `rows` at its `tensors`, `losses` that
    over its held-out examples when an epoch ends; without it no epoch is judged.

    It replaces the elements of `trainings` one by one, so an interrupt leaves each before a step or after
    it. It requests the next round before it yields one, so the caller's work overlaps the wait. Raises
    Diverged.
    """
    clocked = time.monotonic()
    current = _next_round(trainings, gradients, losses)
    while current is not None:
        steps = current.gradients()
        seconds, clocked = _seconds_each(clocked, steps)
        for i, (loss, gradient) in zip(current.stepped, steps, strict=True):
            try:
                trainings[i] = trainings[i].stepped(loss, gradient, seconds=seconds)
            except UpdateFailed as error:
                raise Diverged(str(error), i) from error
        for i, loss in zip(current.judged, current.losses(), strict=True):
            trainings[i] = trainings[i].judge(loss)
        stepped = current.stepped
        current = _next_round(trainings, gradients, losses)
        yield stepped


@dataclass(frozen=True)
class _Round:
    """One round: which trainings step, which judge an epoch, and what waits for the answers."""

    stepped: list[int]
    judged: list[int]
    gradients: Callable[[], Sequence[tuple[float, ShiftTensors]]]
    losses: Callable[[], Sequence[float]]


def _next_round(
    trainings: Sequence[Training[S]], gradients: Gradients[S], losses: Losses[S] | None
) -> _Round | None:
    """Request the next round; None when there is none."""
    judged = {i: t for i, t in enumerate(trainings) if losses is not None and t.at_epoch_end}
    stepped = {i: t for i, t in enumerate(trainings) if i not in judged and not t.done}
    if not judged and not stepped:
        return None
    return _Round(
        list(stepped),
        list(judged),
        gradients(stepped) if stepped else list,
        losses(judged) if judged and losses is not None else list,
    )


def _seconds_each(clocked: float, steps: Sequence[object]) -> tuple[float, float]:
    """(seconds a step, now); without steps the time counts to the next round."""
    now = time.monotonic()
    return ((now - clocked) / len(steps), now) if steps else (0.0, clocked)
