"""An update: training a personal shift step by step, with gradients that somebody else computes.

Knows no gRPC. What an interrupted update needs lies in one sealed checkpoint: tensors, moments,
step, and the plan they belong to. The order of examples is a function of the plan's seed and the
epoch, so a resumed update takes the very steps that an uninterrupted one would have taken.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import safetensors.numpy

from perfit_device import personal
from perfit_device.codec import Artefact
from perfit_device.history import HistoryItem, Split
from perfit_device.optimizer import OptimizerConfig, StiefelAdamW
from perfit_device.patience import PASSING, Patience
from perfit_device.personal import PersonalShift
from perfit_device.vault import Vault
from perfit_shared.errors import InvalidInput, UpdateFailed, VaultDamaged
from perfit_shared.shifts import ShiftTensors

__all__ = ["Gate", "Plan", "Result", "Update", "forget_checkpoint", "place_of", "read_checkpoint", "schedule"]

_KIND = "checkpoint"
_FEWEST_STEPS = 150  # of an update, unless the user says otherwise
Gradient = Callable[[Sequence[HistoryItem], ShiftTensors], tuple[float, int, ShiftTensors]]
Evaluate = Callable[[Sequence[HistoryItem], ShiftTensors], float]


@dataclass(frozen=True)
class Plan:
    """What an update will do. Two with equal plans take equal steps. Raises InvalidInput."""

    epochs: int
    learning_rate: float  # peak
    batch_size: int  # examples a step
    seed: int
    fresh: bool  # start from the seed shift rather than from the current one
    history: str  # digest of the split
    version: str  # of the artefact
    examples: int  # in the train part

    def __post_init__(self) -> None:
        if not 1 <= self.epochs <= 1000 or not 1 <= self.batch_size <= 4096 or self.seed < 0:
            raise InvalidInput("epochs and batch size should be at least 1, and the seed not negative")
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
        order = np.random.default_rng([self.seed, epoch]).permutation(self.examples)
        return [int(row) for row in order[place * self.batch_size : (place + 1) * self.batch_size]]


def schedule(
    artefact: Artefact, examples: int, *, epochs: int | None = None, batch_size: int | None = None
) -> tuple[int, int]:
    """(epochs, batch size) of an update: what the user asks for, else the artefact's, fit to a short history.

    The artefact's figures are made for long histories; on a short one they end before much is
    learned. On the 77 training examples of the demo's Ravi 88 steps end at a test loss of 1.36, 154
    at 0.93 and 220 at 0.80. So a batch is at most a tenth of the examples, or 4 where that is more,
    and there are as many epochs as 150 steps take; the gate keeps the best one.
    """
    if batch_size is None:
        batch_size = min(artefact.batch_size, max(4, examples // 10))
    batch_size = min(batch_size, examples)
    if epochs is None:
        steps_per_epoch = math.ceil(examples / max(1, batch_size))  # Plan refuses a size below 1
        epochs = max(artefact.epochs, math.ceil(_FEWEST_STEPS / steps_per_epoch))
    return epochs, batch_size


@dataclass(frozen=True)
class Gate:
    """Mean nats a token on the gate part, before and after (of the best epoch)."""

    before: float
    after: float

    @property
    def accepted(self) -> bool:
        return self.after < self.before


@dataclass(frozen=True)
class Result:
    steps: int
    epochs: int
    examples: int
    loss_first: float  # mean over the first epoch's steps, nats a token
    loss_last: float  # over the last epoch's
    gate: Gate
    seconds: float  # of training, over all runs that this update took
    resumed_from: int  # step


@dataclass(frozen=True)
class Checkpoint:
    """A half-done update."""

    plan: Plan
    tensors: ShiftTensors
    optimizer: StiefelAdamW
    losses: list[float] = field(default_factory=list)  # by step
    seconds: float = 0.0
    judged: int = 0  # the step, at an epoch's end, that the gate part was last measured at
    best_loss: float = math.inf  # on the gate part, of the best epoch so far
    best: ShiftTensors | None = None

    @property
    def step(self) -> int:
        return len(self.losses)

    def to_bytes(self) -> bytes:
        header = {
            "plan": asdict(self.plan), "losses": self.losses, "seconds": self.seconds,
            "judged": self.judged, "best_loss": self.best_loss,
        }  # fmt: skip
        parts = [json.dumps(header).encode(), self.tensors.to_bytes(), self.optimizer.to_bytes()]
        if self.best is not None:
            parts.append(self.best.to_bytes())
        return b"".join(len(part).to_bytes(8, "big") + part for part in parts)

    @classmethod
    def from_bytes(cls, data: bytes) -> Checkpoint:
        """Raises VaultDamaged."""
        try:
            parts = []
            while data:
                size = int.from_bytes(data[:8], "big")
                parts.append(data[8 : 8 + size])
                data = data[8 + size :]
            header: dict[str, Any] = json.loads(parts[0])
            return cls(
                plan=Plan(**header["plan"]),
                tensors=ShiftTensors.from_named(safetensors.numpy.load(parts[1])),
                optimizer=StiefelAdamW.from_bytes(parts[2]),
                losses=header["losses"],
                seconds=header["seconds"],
                judged=header["judged"],
                best_loss=header["best_loss"],
                best=ShiftTensors.from_named(safetensors.numpy.load(parts[3])) if len(parts) > 3 else None,
            )
        except (ValueError, KeyError, TypeError, IndexError, safetensors.SafetensorError) as error:
            raise VaultDamaged("the vault holds a half-done update that cannot be read") from error


def place_of(cloud_id: str, artefact: str, task: str) -> str:
    """The name of a checkpoint in the vault. It ends in the task, by which `forget` finds it."""
    return f"{personal.place_of(cloud_id, artefact)}/{task}"


def read_checkpoint(vault: Vault, place: str) -> Checkpoint | None:
    data = vault.get(_KIND, place)
    return None if data is None else Checkpoint.from_bytes(data)


def forget_checkpoint(vault: Vault, place: str) -> bool:
    return vault.delete(_KIND, place)


class Update:
    """One update of one artefact's personal shift, from its first step or from its checkpoint.

    `start` is what training begins with, `current` what the gate compares with (and `updates` how
    many updates made it): the same, but for a fresh update, where both are the seed shift.
    """

    def __init__(
        self, vault: Vault, cloud_id: str, artefact: Artefact, split: Split, plan: Plan, *,
        start: ShiftTensors, updates: int, gradient: Gradient, evaluate: Evaluate,
        patience: Patience | None = None, checkpoint_seconds: float = 30.0,
        progress: Callable[[int, int, float], None] | None = None,
    ) -> None:  # fmt: skip
        self._vault = vault
        self._cloud_id = cloud_id
        self._artefact = artefact
        self._split = split
        self._start = start
        self._updates = updates
        self._gradient = gradient
        self._evaluate = evaluate
        self._patience = patience or Patience()
        self._checkpoint_seconds = checkpoint_seconds
        self._progress = progress
        self._place = place_of(cloud_id, artefact.name, artefact.task.name)
        kept = read_checkpoint(vault, self._place)
        if kept is not None and kept.plan == plan:
            self._state = kept
        else:
            optimizer = StiefelAdamW(OptimizerConfig(plan.learning_rate, plan.steps))
            self._state = Checkpoint(plan, start, optimizer)
        self._saved = self._state.step
        self.resumed_from = self._state.step

    @property
    def step(self) -> int:
        """Steps done."""
        return self._state.step

    def run(self) -> Result:
        """Train to the end, and let the gate decide.

        Raises UpdateFailed when the cloud stays away or training diverges, and whatever else the
        callables raise; the checkpoint holds every step that was done, after Ctrl-C too.
        """
        try:
            self._train()
            before = self._patience.call(lambda: self._evaluate(self._split.gate, self._start))
            gate = Gate(before, after=self._state.best_loss)
        except PASSING as error:
            self._save()
            raise UpdateFailed(
                f"{error}; stopped after step {self.step} of {self._state.plan.steps}, "
                "and `perfit update` resumes there"
            ) from error
        except BaseException:
            self._save()
            raise
        self._finish(gate)
        return self._result(gate)

    def _train(self) -> None:
        plan = self._state.plan
        last_saved = clocked = time.monotonic()
        while True:
            if self.step > self._state.judged and self.step % plan.steps_per_epoch == 0:
                self._judge()
            if self.step >= plan.steps:
                return
            state = self._state
            batch = [self._split.train[row] for row in plan.batch(state.step)]
            loss, _, gradient = self._patience.call(partial(self._gradient, batch, state.tensors))
            if not math.isfinite(loss) or not math.isfinite(gradient.norm()):
                forget_checkpoint(self._vault, self._place)
                self._saved = state.step
                raise UpdateFailed(
                    f"the loss is no longer a number at step {state.step + 1}, so this update was dropped "
                    f"and your shift stays as it was; try --lr {plan.learning_rate / 3:.2g}"
                )
            optimizer = state.optimizer.copy()
            tensors = optimizer.step(state.tensors, gradient)
            now = time.monotonic()
            # All in one assignment: an interrupt between two lines must not part them.
            self._state = replace(
                state,
                tensors=tensors,
                optimizer=optimizer,
                losses=[*state.losses, loss],
                seconds=state.seconds + now - clocked,
            )
            clocked = now
            if self._progress is not None:
                self._progress(self.step, plan.steps, loss)
            if now - last_saved >= self._checkpoint_seconds:
                self._save()
                last_saved = now

    def _judge(self) -> None:
        """Measure the gate part at the end of an epoch; the best epoch's tensors are the candidate.

        A later epoch may have learned the train part by heart.
        """
        state = self._state
        loss = self._patience.call(lambda: self._evaluate(self._split.gate, state.tensors))
        better = loss < state.best_loss
        self._state = replace(
            state,
            judged=state.step,
            best_loss=loss if better else state.best_loss,
            best=state.tensors if better else state.best,
        )

    def _save(self) -> None:
        if self._state.step > self._saved:
            self._vault.put(_KIND, self._place, self._state.to_bytes())
            self._saved = self._state.step

    def _finish(self, gate: Gate) -> None:
        """The candidate becomes current, or not, and the checkpoint goes: in one transaction."""
        with self._vault.transaction():
            if gate.accepted and self._state.best is not None:
                updates = 1 if self._state.plan.fresh else self._updates + 1
                shift = PersonalShift(self._state.best, updates)
                personal.store(self._vault, self._cloud_id, self._artefact, shift)
            forget_checkpoint(self._vault, self._place)

    def _result(self, gate: Gate) -> Result:
        plan, losses = self._state.plan, self._state.losses
        per_epoch = plan.steps_per_epoch
        return Result(
            steps=plan.steps,
            epochs=plan.epochs,
            examples=plan.examples,
            loss_first=sum(losses[:per_epoch]) / per_epoch,
            loss_last=sum(losses[-per_epoch:]) / per_epoch,
            gate=gate,
            seconds=self._state.seconds,
            resumed_from=self.resumed_from,
        )
