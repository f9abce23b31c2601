"""Personal training (PerFit, stage 2) as values: which examples a step takes, and what it leaves.

Whoever computes the gradients drives it: a device over the wire, the research pipeline in process.

    training = Training.start(schedule, tensors)
    while not training.done:
        loss, gradient = …            # of examples training.rows, at training.tensors
        training = training.stepped(loss, gradient)

A `Training` is never changed, so an interrupt between two lines leaves the old one or the new one.
The order of examples is a function of seed and epoch, so a resumed run takes the very steps that an
uninterrupted one would have taken.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, replace
from typing import Any, Generic, Self, TypeVar

import numpy as np
import safetensors
import safetensors.numpy

from perfit_shared.errors import InvalidData, InvalidInput, PerfitError, UpdateFailed
from perfit_shared.optimizer import OptimizerConfig, StiefelAdamW
from perfit_shared.shifts import ShiftTensors

__all__ = ["PaperSchedule", "Schedule", "Training"]

_POOLED = 50  # batches, at most, whose examples are sorted by length together


@dataclass(frozen=True)
class Schedule:
    """What training will do; two with equal schedules take equal steps. Raises InvalidInput."""

    epochs: int
    learning_rate: float  # peak
    batch_size: int  # examples a step
    seed: int
    examples: int

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
        epoch, place = divmod(step, self.steps_per_epoch)
        return self._order(epoch)[place * self.batch_size : (place + 1) * self.batch_size]

    def _order(self, epoch: int) -> list[int]:
        rows: list[int] = np.random.default_rng([self.seed, epoch]).permutation(self.examples).tolist()
        return rows

    def optimizer(self) -> OptimizerConfig:
        return OptimizerConfig(self.learning_rate, self.steps)


@dataclass(frozen=True)
class PaperSchedule(Schedule):
    """As the paper trains, which is Hugging Face's trainer with `group_by_length`.

    An epoch's permutation is cut into pools of up to 50 batches, at least four of them; each pool is
    sorted by length, longest first, and the longest example of all comes first of all, so that memory
    runs out at once or never. The first step's rate is 0 (`learning_rate_at`).
    """

    lengths: tuple[int, ...]  # of each example, tokens of prompt and target

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

    def optimizer(self) -> OptimizerConfig:
        return OptimizerConfig(self.learning_rate, self.steps, schedule="paper")


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
    def start(cls, schedule: S, tensors: ShiftTensors) -> Self:
        return cls(schedule, tensors, StiefelAdamW(schedule.optimizer()))

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
        """Whether an epoch ended here that `judge` has not been told of."""
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
        """After measuring held-out examples at an epoch's end; the best epoch's tensors are kept.

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
        return b"".join(piece for part in parts for piece in (len(part).to_bytes(8, "big"), part))

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
