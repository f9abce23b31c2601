"""An update: training a personal shift step by step, with gradients that others compute.

It knows no gRPC. One sealed checkpoint holds what an interrupted update needs: tensors, moments, step and
plan.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import NamedTuple

from perfit_device import personal, process_limits
from perfit_device.cloud.codec import Artefact
from perfit_device.cloud.retry import TRANSIENT, RetryPolicy
from perfit_device.personal import PersonalShift, TrainingSummary
from perfit_device.vault.store import Vault
from perfit_shared.errors import Diverged, InvalidData, InvalidInput, UpdateFailed, VaultDamaged, VaultUnswept
from perfit_shared.shifts import ShiftTensors
from perfit_shared.training import Schedule, Training, train

__all__ = [
    "Plan",
    "Result",
    "Source",
    "Update",
    "UpdateSettings",
    "ValidationGate",
    "forget_checkpoint",
    "forget_finished",
    "read_checkpoint",
    "read_finished",
    "update_row",
]

_KIND, _FINISHED = "checkpoint", "finished"
# Both send a request and return what waits for the answer; called again after an error, it repeats it.
Gradient = Callable[[Sequence[int], ShiftTensors], Callable[[], tuple[float, int, ShiftTensors]]]
Evaluate = Callable[[ShiftTensors], Callable[[], float]]


@dataclass(frozen=True)
class Plan(Schedule):
    """A schedule with what it was made for: a half-done update goes on only under an equal plan."""

    fresh: bool  # start from the seed shift rather than from the current one
    history: str  # digest of the split
    version: str  # of the artefact


@dataclass(frozen=True)
class ValidationGate:
    """Mean nats a token on the gate part, of the current shift and of the new one (of its best epoch)."""

    before: float
    after: float
    anyway: bool = False  # the new one is taken even where it is no better

    @property
    def accepted(self) -> bool:
        return self.anyway or self.after < self.before


@dataclass(frozen=True)
class Result:
    steps: int
    epochs: int
    examples: int
    loss_first: float  # mean over the first epoch's steps, nats a token
    loss_last: float  # over the last epoch's
    gate: ValidationGate
    seconds: float  # of training, over all runs that this update took
    resumed_from: int  # step


def update_row(cloud_id: str, artefact: str, task: str) -> str:
    """The name of a checkpoint in the vault. It ends in the task, by which `forget` finds it."""
    return f"{personal.shift_row(cloud_id, artefact)}/{task}"


def read_checkpoint(vault: Vault, row: str) -> Training[Plan] | None:
    """A half-done update, None when there is none. Raises VaultDamaged."""
    data = vault.get(_KIND, row)
    if data is None:
        return None
    try:
        return Training.from_bytes(data, Plan)
    except InvalidData as error:
        raise VaultDamaged("the vault holds a half-done update that cannot be read") from error


def forget_checkpoint(vault: Vault, row: str) -> bool:
    return vault.delete(_KIND, row)


@dataclass(frozen=True)
class Finished:
    """The update that ended last: under an equal plan and model another one would learn nothing new."""

    plan: Plan
    fingerprint: str  # of the cloud's base model
    accepted: bool


def read_finished(vault: Vault, row: str) -> Finished | None:
    """None when there was none, or one of another version of perfit."""
    data = vault.get(_FINISHED, row)
    try:
        values = json.loads(data or b"")
        return Finished(Plan(**values["plan"]), str(values["fingerprint"]), bool(values["accepted"]))
    except (ValueError, KeyError, TypeError, InvalidInput):
        return None


def forget_finished(vault: Vault, row: str) -> bool:
    """After an undo its result is not in use, so an equal update is useful again."""
    return vault.delete(_FINISHED, row)


class Source(NamedTuple):
    """Where gradients and losses come from: `gradient` of rows of the train part, `loss` of the gate's."""

    gradient: Gradient
    loss: Evaluate


@dataclass(frozen=True)
class UpdateSettings:
    """How an update runs, apart from its plan."""

    current: PersonalShift | None = None  # the user's shift, with which the gate compares; None: the start
    forgotten: int = 0  # `history.forgotten` of the task
    fingerprint: str = ""  # of the cloud's base model
    anyway: bool = False  # the gate lets the new version through all the same
    retry_policy: RetryPolicy = field(default_factory=RetryPolicy)
    checkpoint_seconds: float = 30.0  # between two checkpoints
    progress: Callable[[int, int, float], None] = lambda step, steps, loss: None  # called after a step


class Update:
    """One update of one artefact's personal shift, from its first step or from its checkpoint."""

    def __init__(
        self,
        vault: Vault,
        cloud_id: str,
        artefact: Artefact,
        plan: Plan,
        *,
        start: ShiftTensors,
        source: Source,
        settings: UpdateSettings | None = None,
    ) -> None:
        """`start`: what training begins with, which may be the seed although there is a `current`."""
        self._vault = vault
        self._cloud_id = cloud_id
        self._artefact = artefact
        self._start = start
        self._source = source
        self._settings = settings or UpdateSettings()
        self._row = update_row(cloud_id, artefact.name, artefact.task.name)
        checkpoint = read_checkpoint(vault, self._row)
        if checkpoint is None or checkpoint.schedule != plan:
            checkpoint = Training.start(plan, start)
        self._training = [checkpoint]
        self._saved = self._state  # what the vault has, or nothing worth saving yet
        self.resumed_from = self._state.step

    @property
    def _state(self) -> Training[Plan]:
        """Where training stands; `train` replaces it."""
        return self._training[0]

    @property
    def step(self) -> int:
        """Steps done."""
        return self._state.step

    def run(self) -> Result:
        """Train to the end, and let the gate decide.

        Raises VaultError before the first step when the vault could not take what comes of it,
        UpdateFailed when the cloud stays away or training diverges, and whatever else the callables
        raise; the checkpoint holds every step that was done, after Ctrl-C too.
        """
        self._vault.reserve(self._largest())
        try:
            self._train()
            compared = self._start if self._settings.current is None else self._settings.current.tensors
            before = self._settings.retry_policy.call(self._source.loss(compared))
            gate = ValidationGate(before, after=self._state.best_loss, anyway=self._settings.anyway)
        except TRANSIENT as error:
            self._save()
            raise UpdateFailed(
                f"{error}; stopped after step {self.step} of {self._state.schedule.steps}, "
                "and `perfit update` resumes there"
            ) from error
        except Diverged as error:
            # Keep the steps so far: the cloud may be at fault.
            self._save()
            raise UpdateFailed(
                f"{error}, or `perfit update` as before, which resumes after step {self.step}; "
                "your shift stays as it was"
            ) from error
        except BaseException:
            self._save()
            raise
        self._finish(gate)
        return self._result(gate)

    def _largest(self) -> int:
        """Bytes that this update adds to the vault at most: a checkpoint, or a version beside another.

        A checkpoint holds the tensors, two moments of each, the best epoch's, and a loss a step.
        """
        return 5 * len(self._start.to_bytes()) + 24 * self._state.schedule.steps

    def _train(self) -> None:
        """Step by step. The bookkeeping of one step runs while the cloud computes the next."""
        last_saved = last_done = time.monotonic()
        for stepped in train(self._training, gradients=self._ask_gradient, losses=self._ask_loss):
            if stepped:
                self._settings.progress(self.step, self._state.schedule.steps, self._state.losses[-1])
            took, last_done = time.monotonic() - last_done, time.monotonic()
            # Save early where one more such step would exceed what a kill may cost.
            if last_done - last_saved + took >= self._settings.checkpoint_seconds:
                self._save()
                last_saved = time.monotonic()
            process_limits.release_memory()

    def _ask_gradient(
        self, trainings: Mapping[int, Training[Plan]]
    ) -> Callable[[], list[tuple[float, ShiftTensors]]]:
        (state,) = trainings.values()
        found = self._source.gradient(state.rows, state.tensors)

        def wait() -> list[tuple[float, ShiftTensors]]:
            loss, _tokens, gradient = self._settings.retry_policy.call(found)
            return [(loss, gradient)]

        return wait

    def _ask_loss(self, trainings: Mapping[int, Training[Plan]]) -> Callable[[], list[float]]:
        (state,) = trainings.values()
        found = self._source.loss(state.tensors)
        return lambda: [self._settings.retry_policy.call(found)]

    def _save(self) -> None:
        if self._state is self._saved:
            return
        # On a full disk traces of the last checkpoint stay in the file until the next save.
        with contextlib.suppress(VaultUnswept):
            self._vault.put(_KIND, self._row, self._state.to_bytes())
        self._saved = self._state

    def _finish(self, gate: ValidationGate) -> None:
        """Store the new version if the gate accepts it, and drop the checkpoint, in one transaction."""
        with self._vault.transaction():
            if gate.accepted and self._state.best is not None:
                shift, learned = self._shift(self._state.best), self._learned(gate)
                personal.store(self._vault, self._cloud_id, self._artefact, shift, learned)
            forget_checkpoint(self._vault, self._row)
            finished = Finished(self._state.schedule, self._settings.fingerprint, gate.accepted)
            self._vault.put(_FINISHED, self._row, json.dumps(asdict(finished)).encode())

    def _shift(self, tensors: ShiftTensors) -> PersonalShift:
        """The new version. It inherits `forgotten` from the version that it continues."""
        if self._state.schedule.fresh or self._settings.current is None:
            return PersonalShift(tensors, 1, self._settings.forgotten)
        return PersonalShift(tensors, self._settings.current.updates + 1, self._settings.current.forgotten)

    def _learned(self, gate: ValidationGate) -> TrainingSummary:
        """The record that stays with the new version."""
        first, last = self._losses()
        return TrainingSummary(self._state.schedule.examples, first, last, gate.before, gate.after)

    def _losses(self) -> tuple[float, float]:
        """Means over the first and the last epoch's steps."""
        per_epoch, losses = self._state.schedule.steps_per_epoch, self._state.losses
        return sum(losses[:per_epoch]) / per_epoch, sum(losses[-per_epoch:]) / per_epoch

    def _result(self, gate: ValidationGate) -> Result:
        plan = self._state.schedule
        first, last = self._losses()
        return Result(
            steps=plan.steps,
            epochs=plan.epochs,
            examples=plan.examples,
            loss_first=first,
            loss_last=last,
            gate=gate,
            seconds=self._state.seconds,
            resumed_from=self.resumed_from,
        )
