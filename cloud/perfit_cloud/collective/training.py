"""Stage 1 (PerFit, Algorithm 1): φ₁ and φ₂ learned together on everybody's examples.

The base stays frozen; both shifts start as exact identities and are applied as φ₂∘φ₁ by the same
code that serves them. What comes out is the collective shift φ₁ and the seed φ₂ that every user
starts from.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from perfit_cloud.collective import checkpoint
from perfit_cloud.collective.checkpoint import Record, Snapshot
from perfit_cloud.collective.data import Corpus
from perfit_cloud.collective.forward import forward_for
from perfit_cloud.collective.optimizer import StiefelAdam
from perfit_cloud.collective.privacy import Budget, Privacy, PrivateSteps
from perfit_cloud.collective.processes import Processes
from perfit_cloud.collective.progress import Progress
from perfit_cloud.collective.steps import Losses, batches, rate_at, spread, trainable
from perfit_cloud.engine.gradients.batch import Pair
from perfit_cloud.model.base import BaseModel
from perfit_cloud.model.interventions import Phi
from perfit_shared.errors import Cancelled, InvalidInput
from perfit_shared.shifts import ShiftSpec, ShiftTensors
from perfit_shared.tasks import Task

__all__ = ["FORWARD", "RunControl", "Stage1Settings", "Stage1Training"]

FORWARD = 0.4  # cost of a forward pass alone, in units of one forward and backward
_CHECKPOINT_SECONDS = 60.0
_CHECK_SHARE = 0.15  # of an epoch's work, most that validating within it may add
_LEAST_CHECKS, _MOST_CHECKS = 2, 8  # of an epoch
_PATIENCE = 3  # checks without a lower validation loss that end the training


@dataclass(frozen=True)
class Stage1Settings:
    """How to train. Raises InvalidInput when built with values that cannot be."""

    spec: ShiftSpec
    epochs: int  # passes over everybody's examples
    batch_size: int  # examples a step, of all processes together
    device_epochs: int  # passes over one user's history, on devices
    learning_rate: float | None = None  # peak; None: chosen on the validation slice
    device_learning_rate: float | None = None  # peak; None: chosen by trial personal updates
    seed: int = 0
    accumulate: int = 1  # micro-batches that a process splits its share of a batch into
    gradient_checkpointing: bool = False  # compute activations twice instead of keeping them
    budget: Budget | None = None  # of differential privacy by person; None: there is none

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "device_epochs", "accumulate"):
            if getattr(self, name) < 1:
                raise InvalidInput(f"{name.replace('_', ' ')} should be at least 1")
        if self.accumulate > self.batch_size:
            raise InvalidInput(
                f"a batch of {self.batch_size} cannot be split into {self.accumulate} micro-batches"
            )
        for rate in (self.learning_rate, self.device_learning_rate):
            if rate is not None and not 0 < rate < 1:
                raise InvalidInput("a learning rate should lie between 0 and 1")
        if self.budget is not None and self.learning_rate is None:
            raise InvalidInput("trying learning rates on private data would cost privacy; give --lr")
        if self.budget is not None and self.accumulate > 1:
            raise InvalidInput("private training takes people one by one; leave out --accumulate")


@dataclass(frozen=True)
class RunControl:
    """Where a run writes and reports, and when it ends."""

    out: Path
    progress: Progress
    # Runs after every step. When it is true on any process, all save the run and raise Cancelled.
    stop: Callable[[], bool] = lambda: False


class Stage1Training:
    """One run: its data, its two shifts and its record. It works inside `prepared()`.

    Raises InvalidInput when the processes differ in data or settings.
    """

    def __init__(
        self,
        base: BaseModel,
        corpus: Corpus,
        task: Task,
        settings: Stage1Settings,
        *,
        processes: Processes,
        control: RunControl,
    ) -> None:
        self.base, self.corpus, self.task, self.settings = base, corpus, task, settings
        self.processes = processes
        self._forward = forward_for(base, settings.spec, processes=processes.count)
        self.losses = Losses(self._forward, processes=processes, accumulate=settings.accumulate)
        self.examples = corpus.examples()
        self._lengths = [len(prompt) + len(target) for prompt, target in self.examples]
        self.progress, self._stop, self._out = control.progress, control.stop, control.out
        self._arguments = _arguments(base, corpus, task, settings)
        self.privacy: Privacy | None = None
        self._private: PrivateSteps | None = None
        self.steps_an_epoch = -(-len(self.examples) // settings.batch_size)
        self.steps = self.steps_an_epoch * settings.epochs
        if settings.budget is not None:
            self._be_private(settings.budget)
        self._check_steps = self._checks()
        self._planned, self._plan = -1, [[0]]  # epoch, its batches
        self.record = Record()
        self.collective, self.personal, self._optimizer = self.fresh()
        self._best = self._copy()
        self._since = self._saved = time.monotonic()
        self._resume()

    def _be_private(self, budget: Budget) -> None:
        if self.processes.count > 1:
            raise InvalidInput("private training runs in one process; leave out the launcher")
        self.privacy = budget.privacy(people=len(self.corpus.train), epochs=self.settings.epochs)
        self._private = PrivateSteps(self.losses, self.corpus.train, self.privacy)
        self.steps = self.privacy.steps
        self.steps_an_epoch = self.steps // self.settings.epochs

    def fresh(self) -> tuple[dict[int, Phi], dict[int, Phi], StiefelAdam]:
        """(φ₁, φ₂, optimizer over both), φ exactly the identity; the same on every call."""
        spec, seed, device = self.settings.spec, self.settings.seed, self.base.device
        moves = self.privacy is None  # fewer numbers need less noise
        collective = trainable(
            ShiftTensors.identity(spec, spec.collective_rank, 2 * seed), device, rotations=moves
        )
        personal = trainable(
            ShiftTensors.identity(spec, spec.personal_rank, 2 * seed + 1), device, rotations=moves
        )
        return collective, personal, StiefelAdam([collective, personal])

    @contextlib.contextmanager
    def prepared(self) -> Iterator[None]:
        """What no shift changes is cached, where an example is needed more than once."""
        with contextlib.ExitStack() as stack:
            if self.settings.gradient_checkpointing:
                stack.enter_context(self._forward.recomputing())
            self.losses.cache(self._repeated, self._homes(), self._cached)
            yield

    @property
    def _repeated(self) -> list[Pair]:
        """Pairs that are run several times: in one epoch only those that are validated on."""
        once = self.settings.epochs == 1
        return [*([] if once else self.examples), *self.corpus.validation]

    def _homes(self) -> list[int]:
        """The process of each of `_repeated`."""
        count = self.processes.count
        if count == 1:
            return [0] * len(self._repeated)
        epochs = self.settings.epochs
        homes = spread([self._batches(epoch) for epoch in range(epochs)], count) if epochs > 1 else []
        return [*homes, *(i % count for i in range(len(self.corpus.validation)))]

    @property
    def cache_work(self) -> float:
        """Units to fill the cache, of this process."""
        pairs = len(self._repeated) if self._forward.caches_activations else 0
        return FORWARD * pairs / self.processes.count

    def _cached(self, examples: int) -> None:
        self.progress.advance(FORWARD * examples, "running once what no step changes")
        if (
            self.processes.count == 1
        ):  # a pause is a meeting, and processes fill in different numbers of chunks
            self.pause()

    def batch(self, index: int) -> list[Pair]:
        """The examples of step `index` of the run."""
        epoch, number = divmod(index, self.steps_an_epoch)
        if epoch != self._planned:
            self._planned, self._plan = epoch, self._batches(epoch)
        return [self.examples[i] for i in self._plan[number]]

    def _batches(self, epoch: int) -> list[list[int]]:
        size, seed = self.settings.batch_size, self.settings.seed
        return batches(self._lengths, batch_size=size, seed=seed, epoch=epoch)

    def validation_loss(self, *, mode: str = "seed") -> float:
        """Loss on the validation slice, nats a token: "base", "collective" (φ₁ alone) or "seed" (φ₂∘φ₁)."""
        loss = self.losses.mean(
            self.corpus.validation,
            collective=None if mode == "base" else self.collective,
            personal=self.personal if mode == "seed" else None,
        )
        self.progress.advance(FORWARD * len(self.corpus.validation), "validating")
        return loss

    def train(self) -> None:
        """All steps that are left, at `record.learning_rate`; ends with the shifts that validate best.

        Those are the untouched model's (the identity) where no step made it better. It ends early when
        the validation loss no longer falls. Raises Cancelled on a stop.
        """
        record = self.record
        if not record.validation:
            self._check()
        while record.step < self.steps and not record.stopped:
            began = time.monotonic()
            rate = rate_at(record.step, self.steps, record.learning_rate)
            examples = self._step(rate)
            record.step_seconds += time.monotonic() - began
            record.step += 1
            self.progress.advance(examples, self._line())
            if record.step % self.steps_an_epoch in self._check_steps:
                self._check()
                self.save()
            self.pause()
        self._take_best()

    def _step(self, rate: float) -> int:
        """One step; returns how many examples it took."""
        record, collective, personal = self.record, self.collective, self.personal
        if self._private is not None:  # records no loss and no tokens
            return self._private.step(
                collective=collective, personal=personal, optimizer=self._optimizer, rate=rate
            )
        pairs = self.batch(record.step)
        loss = self.losses.step(
            pairs, collective=collective, personal=personal, optimizer=self._optimizer, rate=rate
        )
        if not math.isfinite(loss):
            raise InvalidInput(f"the loss is not a number after step {record.step}; try a lower --lr")
        record.tokens += sum(len(prompt) + len(target) for prompt, target in pairs)
        record.train.append(loss)
        return len(pairs)

    @property
    def checks_an_epoch(self) -> int:
        """How often the validation loss is measured."""
        return len(self._check_steps)

    def _checks(self) -> set[int]:
        """Steps of an epoch, modulo its length, after which the validation loss is measured."""
        count = _MOST_CHECKS
        if self.privacy is None:  # the number of examples must not show in anything published
            room = _CHECK_SHARE * len(self.examples) / (FORWARD * len(self.corpus.validation))
            count = min(max(round(room), _LEAST_CHECKS), _MOST_CHECKS)
        count = min(count, self.steps_an_epoch)
        return {round(k * self.steps_an_epoch / count) % self.steps_an_epoch for k in range(1, count + 1)}

    def start_loss(self) -> float:
        """The validation loss of the untouched model, which the shifts start as; measured once."""
        if not self.record.validation:
            self._check()
        return self.record.validation[0][1]

    def _check(self) -> None:
        """Measure the validation loss; keep these shifts if it is the lowest, or see that none will be."""
        record = self.record
        loss = self.validation_loss()
        # NaN counts as the worst loss.
        record.validation.append((record.step, loss if math.isfinite(loss) else math.inf))
        if record.best_step == record.step:
            self._best = self._copy()
        since = [step for step, _ in record.validation if step > record.best_step]
        record.stopped = len(since) >= _PATIENCE and record.step < self.steps
        if record.step:
            self.progress.say(f"step {record.step} of {self.steps}: validation loss {loss:.4f}")

    def _take_best(self) -> None:
        record = self.record
        if record.best_step < record.step:
            early = f", and {_PATIENCE} checks without a lower one ended the training" * record.stopped
            self.progress.say(
                f"the lowest validation loss was at step {record.best_step}{early}; it is taken"
            )
        self._put(self._best)

    def _line(self) -> str:
        record = self.record
        recent = record.train[-20:]
        pace = record.step / record.step_seconds if record.step_seconds else 0.0
        loss = f"  loss {sum(recent) / len(recent):.3f}" if recent else ""
        return f"step {record.step}/{self.steps}{loss}  {pace:.2f} steps/s"

    # -- keeping -------------------------------------------------------------------------------

    def tensors(self) -> list[Tensor]:
        """All tensors of both shifts, in a fixed order."""
        shifts = (self.collective, self.personal)
        return [tensor for shift in shifts for layer in sorted(shift) for tensor in shift[layer]]

    def _copy(self) -> list[Tensor]:
        return [tensor.detach().clone() for tensor in self.tensors()]

    @torch.no_grad()
    def _put(self, tensors: Sequence[Tensor]) -> None:
        for own, new in zip(self.tensors(), tensors, strict=True):
            own.copy_(new)

    def save(self) -> None:
        """Write the checkpoint; only the main process does."""
        now = time.monotonic()
        self.record.seconds += now - self._since
        self._since = self._saved = now
        if not self.processes.main:
            return
        snapshot = Snapshot(self.record, self.tensors(), self._optimizer.state(), self._best)
        checkpoint.save(self._out, self._arguments, snapshot)

    def pause(self) -> None:
        """Save when a minute has passed, and stop here on a stop."""
        if self.processes.any(self._stop()):
            self.save()
            raise Cancelled(
                f"stopped after step {self.record.step} of {self.steps}; the same command goes on from there"
            )
        if time.monotonic() - self._saved >= _CHECKPOINT_SECONDS:
            self.save()

    def _resume(self) -> None:
        if self.processes.broadcast_from_main(lambda: self._arguments) != self._arguments:
            raise InvalidInput("the processes of this run read different models, data or settings")
        snapshot = self.processes.broadcast_from_main(lambda: checkpoint.load(self._out, self._arguments))
        if snapshot is None:
            return
        self.record = snapshot.record
        self._put(snapshot.best)
        self._best = self._copy()  # on this device
        self._put(snapshot.tensors)
        self._optimizer.load(snapshot.optimizer)
        self.progress.skip(self.record.step * self.settings.batch_size)
        self.progress.say(f"going on after step {self.record.step} of {self.steps}")


def _arguments(base: BaseModel, corpus: Corpus, task: Task, settings: Stage1Settings) -> dict[str, Any]:
    """What a resumed run must share with the one it goes on from; keys are words for a message.

    Processes, micro-batches and recomputed activations are not among it: the steps are the same.
    """
    return {
        "model": base.fingerprint,
        "dtype": str(base.model.dtype),
        "data": corpus.digest(),
        "task": hashlib.sha256(task.to_json().encode()).hexdigest(),
        "layers, positions or ranks": settings.spec.to_json(),
        "epochs": settings.epochs,
        "batch size": settings.batch_size,
        "learning rate": settings.learning_rate,
        "device epochs": settings.device_epochs,
        "device learning rate": settings.device_learning_rate,
        "seed": settings.seed,
        "privacy": None if settings.budget is None else asdict(settings.budget),
    }
