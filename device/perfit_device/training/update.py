"""An update: training a personal shift step by step, with gradients that others compute.

It knows no gRPC. One sealed checkpoint holds what an interrupted update needs: tensors, moments, step and
plan.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from typing import NamedTuple

from perfit_device import personal, process_limits
from perfit_device.cloud.codec import Artefact
from perfit_device.cloud.retry import TRANSIENT, RetryPolicy
from perfit_device.shift_versions import PersonalShift, TrainingSummary
from perfit_device.training import distance, journal
from perfit_device.training.gate import ValidationGate
from perfit_device.vault.store import Vault
from perfit_shared.errors import (
    Diverged,
    InvalidData,
    InvalidInput,
    Unavailable,
    UpdateFailed,
    VaultDamaged,
    VaultUnswept,
)
from perfit_shared.shifts import ShiftTensors
from perfit_shared.splits import SMALLEST_PART
from perfit_shared.training import Request, Schedule, Training, train
from perfit_shared.types import Score
from perfit_shared.validation import Comparison, mean_loss

__all__ = [
    "OpenVault",
    "Plan",
    "Result",
    "Source",
    "Update",
    "UpdateSettings",
    "forget_checkpoint",
    "forget_finished",
    "read_checkpoint",
    "read_finished",
    "update_row",
]

_KIND, _FINISHED = "checkpoint", "finished"
OpenVault = Callable[[], AbstractContextManager[Vault]]
# Both send a request and return what waits for the answer; called again after an error, it repeats it.
Gradient = Callable[[Sequence[int], ShiftTensors], Callable[[], tuple[float, int, ShiftTensors]]]
Evaluate = Callable[[Sequence[int], ShiftTensors], Callable[[], Sequence[Score]]]


@dataclass(frozen=True, kw_only=True)
class Plan(Schedule):
    """A schedule with what it was made for: a half-done update goes on only under an equal plan."""

    fresh: bool  # start from the seed shift although there is a current one
    history: str  # digest of the split
    version: str  # of the artefact
    behind: int = 0  # as of PersonalShift
    read: str = ""  # digest of what the examples are read behind

    @property
    def anew(self) -> bool:
        """Whether it starts from the seed. In folds it must: the current shift knows all their examples."""
        return self.fresh or self.folds > 0


@dataclass(frozen=True)
class Result:
    steps: int
    epochs: int  # that were planned
    best_epoch: int
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
    """Where gradients and scores of rows come from; those of the gate stand behind those that train."""

    gradient: Gradient
    scores: Evaluate


@dataclass(frozen=True)
class UpdateSettings:
    """How an update runs, apart from its plan."""

    current: PersonalShift | None = None  # the user's shift, with which the gate compares; None: the start
    forgotten: int = 0  # `history.forgotten` of the task
    names: Sequence[str] = ()  # of the examples that train and judge
    known: int = 0  # largest `order` in the history, as `journal.Entry` has it
    fingerprint: str = ""  # of the cloud's base model
    # Scores under it as it is asked now, where that is behind another number of examples than the plan's.
    as_asked: Evaluate | None = None
    recorded_holds: bool = True  # whether it was asked so, too, when its gate judged it
    anyway: bool = False  # the gate lets the new version through all the same
    retry_policy: RetryPolicy = field(default_factory=RetryPolicy)
    checkpoint_seconds: float = 30.0  # between two checkpoints
    progress: Callable[[int, int, float], None] = lambda step, steps, loss: None  # called after a step
    # Whether what it learns from is still there: others use the vault while it trains.
    holds: Callable[[Vault], bool] = lambda vault: True


class Update:
    """One update of one artefact's personal shift, from its first step or from its checkpoint.

    It takes the vault only to read and to write, so that others have it while the cloud computes.
    """

    def __init__(
        self,
        open_vault: OpenVault,
        cloud_id: str,
        artefact: Artefact,
        plan: Plan,
        *,
        start: ShiftTensors,
        source: Source,
        settings: UpdateSettings | None = None,
    ) -> None:
        """`start`: what training begins with, which may be the seed although there is a `current`."""
        self._open_vault = open_vault
        self._cloud_id = cloud_id
        self._artefact = artefact
        self._start = start
        self._source = source
        self._settings = settings or UpdateSettings()
        self._row = update_row(cloud_id, artefact.name, artefact.task.name)
        with open_vault() as vault:
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
        with self._open_vault() as vault:
            vault.reserve(self._largest())
        retry = self._settings.retry_policy.call  # another process may have the vault
        try:
            self._train()
            gate = self._gate()
        except TRANSIENT as error:
            retry(self._save)
            raise UpdateFailed(
                f"{error}; stopped after step {self.step} of {self._state.schedule.steps}, "
                "and the same command resumes there"
            ) from error
        except Diverged as error:
            # Keep the steps so far: the cloud may be at fault.
            retry(self._save)
            raise UpdateFailed(
                f"{error}, or the same command again, which resumes after step {self.step}; "
                "your shift stays as it was"
            ) from error
        except BaseException:
            retry(self._save)
            raise
        retry(lambda: self._finish(gate))
        return self._result(gate)

    def _largest(self) -> int:
        """Bytes that this update adds to the vault at most: a checkpoint, or a version beside another.

        A checkpoint holds the tensors and two moments of each, also of the folds, the best epoch's, a loss
        a step, and a score an example of every judgement. A version may bring the seed along.
        """
        plan = self._state.schedule
        tensors = 3 * (1 + plan.folds) + 3
        scores = plan.judgements * sum(map(len, plan.judged))
        return tensors * len(self._start.to_bytes()) + 24 * plan.steps + 48 * scores

    def _train(self) -> None:
        """Step by step. The bookkeeping of one step runs while the cloud computes the next."""
        last_saved = last_done = time.monotonic()
        for stepped in train(self._training, gradients=self._gradients, losses=self._scores):
            if stepped:
                self._settings.progress(self.step, self._state.schedule.steps, self._state.losses[-1])
            took, last_done = time.monotonic() - last_done, time.monotonic()
            # Save early where one more such step would exceed what a kill may cost.
            if last_done - last_saved + took >= self._settings.checkpoint_seconds:
                with contextlib.suppress(Unavailable):  # the next step tries again
                    self._save()
                    last_saved = time.monotonic()
            process_limits.release_memory()

    def _gradients(self, requests: Sequence[Request]) -> Callable[[], list[tuple[float, ShiftTensors]]]:
        found = [self._source.gradient(rows, tensors) for _, rows, tensors in requests]

        def wait() -> list[tuple[float, ShiftTensors]]:
            answers = [self._settings.retry_policy.call(each) for each in found]
            return [(loss, gradient) for loss, _tokens, gradient in answers]

        return wait

    def _scores(self, requests: Sequence[Request]) -> Callable[[], list[Sequence[Score]]]:
        found = [self._source.scores(rows, tensors) for _, rows, tensors in requests]
        return lambda: [self._settings.retry_policy.call(each) for each in found]

    def _gate(self) -> ValidationGate:
        """Compare with the start, and with the current shift where that is another, or is asked otherwise."""
        settings, plan, found = self._settings, self._state.schedule, self._state.comparison
        gate = ValidationGate(found, folds=plan.folds, anyway=settings.anyway)
        current = settings.current
        if current is None or (current.tensors is self._start and settings.as_asked is None):
            return gate
        seen = current.learned.examples or 0
        rows = [row for part in plan.judged for row in part]
        unseen = [i for i, row in enumerate(rows) if row >= seen]
        if len(unseen) < SMALLEST_PART:
            return replace(gate, recorded=current.learned.gate_after) if settings.recorded_holds else gate
        asked = (settings.as_asked or self._source.scores)([rows[i] for i in unseen], current.tensors)
        before = settings.retry_policy.call(asked)
        return replace(gate, current=Comparison(before, [found.after[i] for i in unseen]))

    def _save(self) -> None:
        if self._state is self._saved:
            return
        # On a full disk traces of the last checkpoint stay in the file until the next save.
        with contextlib.suppress(VaultUnswept), self._changing() as vault:
            # The checkpoint before is nothing that anybody forgets; the update's end sweeps it away.
            vault.put(_KIND, self._row, self._state.to_bytes(), sweep=False)
        self._saved = self._state

    def _finish(self, gate: ValidationGate) -> None:
        """Store the new version if the gate accepts it, and drop the checkpoint, in one transaction."""
        with self._changing() as vault:
            if gate.accepted:
                personal.store(vault, self._cloud_id, self._artefact, self._shift(gate))
                if self._began_at_seed:
                    row = personal.shift_row(self._cloud_id, self._artefact.name)
                    distance.write_seed(vault, row, self._artefact, self._start)
            journal.add(vault, self._row, self._entry(vault, gate))
            forget_checkpoint(vault, self._row)
            finished = Finished(self._state.schedule, self._settings.fingerprint, gate.accepted)
            vault.put(_FINISHED, self._row, json.dumps(asdict(finished)).encode())

    @contextlib.contextmanager
    def _changing(self) -> Iterator[Vault]:
        """One transaction. Raises UpdateFailed where nothing of this update may be written any more."""
        with self._open_vault() as vault, vault.transaction():
            if not self._settings.holds(vault):
                raise UpdateFailed(
                    "what this update learns from was forgotten, or its shift undone, while it trained; "
                    "`perfit update` starts anew"
                )
            yield vault

    @property
    def _began_at_seed(self) -> bool:
        return self._state.schedule.anew or self._settings.current is None

    def _entry(self, vault: Vault, gate: ValidationGate) -> journal.Entry:
        versions = personal.read_versions(vault, self._cloud_id, self._artefact.name)
        first, last = self._losses()
        return journal.Entry(
            date=journal.now(),
            known=self._settings.known,
            examples=self._state.schedule.examples,
            judges=len(gate.start.after),
            train_before=first,
            train_after=last,
            gate_before=mean_loss(gate.start.before),
            gate_after=mean_loss(gate.start.after),
            error=gate.start.error,
            accepted=gate.accepted,
            version=versions.current if versions and gate.accepted else None,
            seconds=self._state.seconds,
        )

    def _shift(self, gate: ValidationGate) -> PersonalShift:
        """The new version. It inherits `forgotten` and what it knows from the version that it continues."""
        plan, current = self._state.schedule, self._settings.current
        marks, continued = personal.marks_of(self._settings.names), None if plan.anew else current
        before: frozenset[bytes] | None = frozenset() if continued is None else continued.trained
        first, last = self._losses()
        # Of all examples that judge: a later gate compares with them, and `gate.current` may have three.
        found = gate.start
        return PersonalShift(
            self._state.ending(self._start),
            updates=1 if plan.fresh or current is None else current.updates + 1,
            forgotten=self._settings.forgotten if continued is None else continued.forgotten,
            learned=TrainingSummary(plan.examples, first, last, *map(mean_loss, (found.before, found.after))),
            behind=plan.behind,
            trained=None if before is None else marks | before,
        )

    def _losses(self) -> tuple[float, float]:
        """Means over the first and the last epoch's steps."""
        per_epoch, losses = self._state.schedule.steps_per_epoch, self._state.losses
        return sum(losses[:per_epoch]) / per_epoch, sum(losses[-per_epoch:]) / per_epoch

    def _result(self, gate: ValidationGate) -> Result:
        plan = self._state.schedule
        first, last = self._losses()
        return Result(
            steps=self.step,
            epochs=plan.epochs,
            best_epoch=self._state.best_step // plan.steps_per_epoch,
            examples=plan.examples,
            loss_first=first,
            loss_last=last,
            gate=gate,
            seconds=self._state.seconds,
            resumed_from=self.resumed_from,
        )
