"""An update: training a personal shift step by step, with gradients that somebody else computes.

Knows no gRPC. What an interrupted update needs lies in one sealed checkpoint: tensors, moments,
step, and the plan they belong to.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from perfit_device import footprint, personal
from perfit_device.codec import Artefact
from perfit_device.patience import PASSING, Patience
from perfit_device.personal import PersonalShift
from perfit_device.vault import Vault
from perfit_shared.errors import InvalidData, UpdateFailed, VaultDamaged, VaultUnswept
from perfit_shared.shifts import ShiftTensors
from perfit_shared.training import Schedule, Training

__all__ = ["Gate", "Plan", "Result", "Update", "forget_checkpoint", "place_of", "read_checkpoint", "schedule"]

_KIND = "checkpoint"
_FEWEST_STEPS = 150  # of an update, unless the user says otherwise
# Both ask, and give what waits for the answer: called again, after an error, it asks again.
Gradient = Callable[[Sequence[int], ShiftTensors], Callable[[], tuple[float, int, ShiftTensors]]]
Evaluate = Callable[[ShiftTensors], Callable[[], float]]


@dataclass(frozen=True)
class Plan(Schedule):
    """A schedule with what it was made for: a half-done update goes on only under an equal plan."""

    fresh: bool  # start from the seed shift rather than from the current one
    history: str  # digest of the split
    version: str  # of the artefact


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


def place_of(cloud_id: str, artefact: str, task: str) -> str:
    """The name of a checkpoint in the vault. It ends in the task, by which `forget` finds it."""
    return f"{personal.place_of(cloud_id, artefact)}/{task}"


def read_checkpoint(vault: Vault, place: str) -> Training[Plan] | None:
    """A half-done update, None when there is none. Raises VaultDamaged."""
    data = vault.get(_KIND, place)
    if data is None:
        return None
    try:
        return Training.from_bytes(data, Plan)
    except InvalidData as error:
        raise VaultDamaged("the vault holds a half-done update that cannot be read") from error


def forget_checkpoint(vault: Vault, place: str) -> bool:
    return vault.delete(_KIND, place)


class Update:
    """One update of one artefact's personal shift, from its first step or from its checkpoint.

    `start` is what training begins with and the gate compares with; `updates` is how many updates
    made it. `gradient` is asked for rows of the training part, `evaluate` for the loss of the gate's.
    """

    def __init__(
        self, vault: Vault, cloud_id: str, artefact: Artefact, plan: Plan, *,
        start: ShiftTensors, updates: int, gradient: Gradient, evaluate: Evaluate,
        patience: Patience | None = None, checkpoint_seconds: float = 30.0,
        progress: Callable[[int, int, float], None] | None = None,
    ) -> None:  # fmt: skip
        self._vault = vault
        self._cloud_id = cloud_id
        self._artefact = artefact
        self._start = start
        self._updates = updates
        self._gradient = gradient
        self._evaluate = evaluate
        self._patience = patience or Patience()
        self._checkpoint_seconds = checkpoint_seconds
        self._progress = progress
        self._place = place_of(cloud_id, artefact.name, artefact.task.name)
        kept = read_checkpoint(vault, self._place)
        self._state = kept if kept is not None and kept.schedule == plan else Training.start(plan, start)
        self._saved = self._state  # what the vault has; at first there may be nothing to keep
        self._clocked = 0.0  # when the last step was done, by the monotonic clock
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
            before = self._patience.call(self._evaluate(self._start))
            gate = Gate(before, after=self._state.best_loss)
        except PASSING as error:
            self._save()
            raise UpdateFailed(
                f"{error}; stopped after step {self.step} of {self._state.schedule.steps}, "
                "and `perfit update` resumes there"
            ) from error
        except BaseException:
            self._save()
            raise
        self._finish(gate)
        return self._result(gate)

    def _train(self) -> None:
        """Step by step; while the cloud works at one, the bookkeeping of the one before is done."""
        last_saved = last_done = self._clocked = time.monotonic()
        answer = self._ask()
        while answer is not None:
            before = self._state.step
            # In one assignment: an interrupt between two lines must not part step and tensors.
            self._state = answer()
            answer = self._ask()
            if self._progress is not None and self.step > before:
                self._progress(self.step, self._state.schedule.steps, self._state.losses[-1])
            took, last_done = time.monotonic() - last_done, time.monotonic()
            # Another step as long as this one might otherwise be more than a kill may cost.
            if last_done - last_saved + took >= self._checkpoint_seconds:
                self._save()
                last_saved = time.monotonic()
            footprint.give_back()

    def _ask(self) -> Callable[[], Training[Plan]] | None:
        """Ask for what comes next; gives what waits for it and tells the new state. None: all is done."""
        state = self._state
        if state.at_epoch_end:
            loss = self._evaluate(state.tensors)
            return lambda: state.judge(self._patience.call(loss))
        if state.done:
            return None
        found = self._gradient(state.rows, state.tensors)
        return lambda: self._stepped(state, *self._patience.call(found))

    def _stepped(
        self, state: Training[Plan], loss: float, _tokens: int, gradient: ShiftTensors
    ) -> Training[Plan]:
        seconds, self._clocked = time.monotonic() - self._clocked, time.monotonic()
        try:
            return state.stepped(loss, gradient, seconds=seconds)
        except UpdateFailed as error:
            # The steps before stay: what is no number may also be a cloud's doing.
            raise UpdateFailed(
                f"{error}, or `perfit update` as before, which resumes after step {state.step}; "
                "your shift stays as it was"
            ) from error

    def _save(self) -> None:
        if self._state is self._saved:
            return
        # What a full disk keeps from being overwritten is the checkpoint before, until the next one.
        with contextlib.suppress(VaultUnswept):
            self._vault.put(_KIND, self._place, self._state.to_bytes())
        self._saved = self._state

    def _finish(self, gate: Gate) -> None:
        """The candidate becomes current, or not, and the checkpoint goes: in one transaction."""
        with self._vault.transaction():
            if gate.accepted and self._state.best is not None:
                updates = 1 if self._state.schedule.fresh else self._updates + 1
                shift = PersonalShift(self._state.best, updates)
                personal.store(self._vault, self._cloud_id, self._artefact, shift)
            forget_checkpoint(self._vault, self._place)

    def _result(self, gate: Gate) -> Result:
        plan, losses = self._state.schedule, self._state.losses
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
