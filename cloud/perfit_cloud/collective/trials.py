"""Learning rates chosen by trying: stage 1's on the validation slice, the devices' on single users.

Both walk one ladder, in decades first and then in half decades around the best, with enough steps to rank
the rates. Of rates that do about equally well the lowest is taken: a rate that is
too low costs some of the gain, one that is too high spoils the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from perfit_cloud.collective.personal import mean_loss, train_people
from perfit_cloud.collective.steps import from_torch, rate_at
from perfit_cloud.collective.training import FORWARD, Stage1Training
from perfit_cloud.engine.gradients.batch import Pair
from perfit_cloud.engine.gradients.session import UpdateEngine
from perfit_cloud.model.artefacts import Artefact
from perfit_shared.errors import Diverged
from perfit_shared.shifts import ShiftTensors
from perfit_shared.splits import LEAST_HISTORY, split_sizes
from perfit_shared.training import Overrides, Schedule, Training, schedule_for

__all__ = [
    "USUAL_TRIALS",
    "Search",
    "choose_device_rate",
    "choose_rate",
    "device_work",
    "ranks_rates",
    "trial_steps",
    "trial_work",
]

# From below what suits billions of parameters (PerFit: 1e-4) past what suits millions (1e-3 at 8M).
LADDER = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
_FIRST = (1e-4, 1e-3)
USUAL_TRIALS = 5  # rates, in most searches
_TIE = 0.9  # a rate with this share of the best one's gain is as good
_LEAST_GAIN = 0.002  # least gain of the best trial update, as a share of the loss before it
_SHARE = 0.1  # of all steps, one trial
_LEAST, _MOST = 20, 100  # steps of one trial, and most of them never more than the run itself has
_ABORT_RATIO = 1.02  # half-way validation loss over the untouched model's, where a trial ends
_DEVICE_SHARE = 0.2  # of stage 1's work, one device rate; at least two users in any case
_KEEP_BYTES = 1 << 30  # of activations, for the updates of devices


@dataclass
class Search:
    """A search of LADDER for the rate with the lowest loss; `start` is the loss without any training."""

    loss_of: Callable[[float], float]  # of a rate; infinity where training diverged
    start: float

    def run(self) -> float:
        """The lowest of those rates that gain about as much as the best; the lowest tried if none gains.

        The loss is taken to have one valley: a rung is tried only where its neighbour was the best.
        """
        losses = {LADDER.index(rate): self.loss_of(rate) for rate in _FIRST}
        for stride in (2, 1):
            while True:
                best = min(losses, key=lambda rung: (losses[rung], rung))
                near = (best - stride, best + stride)
                new = [rung for rung in near if rung not in losses and 0 <= rung < len(LADDER)]
                if not new:
                    break
                losses[new[0]] = self.loss_of(LADDER[new[0]])
        gains = {rung: self.start - loss for rung, loss in losses.items()}
        enough = _TIE * max(gains.values())
        if enough <= 0:
            return LADDER[min(losses)]
        return LADDER[min(rung for rung, gain in gains.items() if gain >= enough)]


# -- stage 1 -----------------------------------------------------------------------------------------


def trial_steps(training: Stage1Training) -> int:
    """Steps of one trial."""
    return min(max(_LEAST, min(_MOST, round(_SHARE * training.steps))), training.steps)


def trial_work(training: Stage1Training) -> float:
    """Units of all trials, about."""
    step = trial_steps(training) * training.settings.batch_size
    return USUAL_TRIALS * (step + 2 * FORWARD * len(training.corpus.validation))


def choose_rate(training: Stage1Training) -> None:
    """Set `record.learning_rate` and `record.trials`: short runs from the start over the same batches.

    Trials that an interrupted run has done are not repeated. Ends with a checkpoint.
    """
    record = training.record
    if training.settings.learning_rate is not None:
        record.learning_rate = training.settings.learning_rate
    if record.learning_rate:
        return
    record.learning_rate = Search(lambda rate: _trial(training, rate), training.start_loss()).run()
    training.progress.say(f"learning rate {record.learning_rate:g}")
    training.save()


def _trial(training: Stage1Training, rate: float) -> float:
    record = training.record
    for done in record.trials:
        if done["learning_rate"] == rate:
            return done["validation_loss"]
    collective, personal, optimizer = training.fresh()
    validation, steps = training.corpus.validation, trial_steps(training)
    loss, taken = math.inf, 0
    for index in range(steps):
        pairs = training.batch(index)
        training.losses.step(
            pairs,
            collective=collective,
            personal=personal,
            optimizer=optimizer,
            rate=rate_at(index, steps, rate),
        )
        taken += 1
        training.progress.advance(len(pairs), f"trying learning rate {rate:g}: step {taken}/{steps}")
        training.pause()
        if taken in (steps // 2, steps):
            loss = training.losses.mean(validation, collective=collective, personal=personal)
            loss = loss if math.isfinite(loss) else math.inf  # it diverged
            training.progress.advance(FORWARD * len(validation), f"trying learning rate {rate:g}")
            if loss > _ABORT_RATIO * training.start_loss():
                break
    training.progress.say(f"learning rate {rate:g}: validation loss {loss:.4f} after {taken} steps")
    record.trials.append({"learning_rate": rate, "validation_loss": loss, "steps": taken})
    training.save()
    return loss


# -- devices -----------------------------------------------------------------------------------------


def device_users(training: Stage1Training) -> list[list[Pair]]:
    """Histories whose updates are simulated: as many as one rate may cost, at least two if there are.

    All of them in a private run: the number of examples must not show in anything published.
    """
    long = [pairs for pairs in training.corpus.histories.values() if len(pairs) >= LEAST_HISTORY]
    if training.privacy is not None:
        return long
    work = _DEVICE_SHARE * len(training.examples) * training.settings.epochs
    chosen: list[list[Pair]] = []
    for pairs in long:
        work -= _work_of(training, pairs)
        if len(chosen) >= 2 and work < 0:
            break
        chosen.append(pairs)
    return chosen


def device_work(training: Stage1Training) -> float:
    """Units of all trial updates, about."""
    return USUAL_TRIALS * sum(_work_of(training, pairs) for pairs in device_users(training))


def _work_of(training: Stage1Training, pairs: Sequence[Pair]) -> int:
    """Units of one update."""
    return _schedule(_artefact(training), pairs, _FIRST[0]).work


def choose_device_rate(training: Stage1Training) -> float:
    """The devices' learning rate: given, else the one with the lowest mean held-out loss, or near it.

    Makes the updates that devices would make and measures on the test part of each history; appends to
    `record.device_trials`, each with the losses before and after. Users held out of stage 1 come first;
    the losses of others flatter. Where no trial gains enough to rank the rates, or nobody has enough
    examples, it is never above stage 1's rate.
    """
    record = training.record
    if training.settings.device_learning_rate is not None:
        return training.settings.device_learning_rate
    users = device_users(training)
    if not users:
        return record.learning_rate
    engine = UpdateEngine(training.base, keep_bytes=_KEEP_BYTES)
    try:
        rate = _DeviceTrials(training, engine, users).search()
    finally:
        engine.close()
    return rate if ranks_rates(record.device_trials) else min(rate, record.learning_rate)


def ranks_rates(device_trials: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the best of these trials gained enough to rank the rates."""
    return any(done["after"] < (1 - _LEAST_GAIN) * done["before"] for done in device_trials)


def _artefact(training: Stage1Training) -> Artefact:
    """What devices would get."""
    settings = training.settings
    return Artefact(
        name=training.task.name,
        spec=settings.spec,
        task=training.task,
        fingerprint=training.base.fingerprint,
        collective=from_torch(training.collective),
        seed=from_torch(training.personal),
        learning_rate=training.record.learning_rate,
        epochs=settings.device_epochs,
        batch_size=settings.batch_size,
    )


def _schedule(artefact: Artefact, pairs: Sequence[Pair], rate: float) -> Schedule:
    """A device's, for a whole history."""
    train, gate, _test = split_sizes(len(pairs), test_apart=False)
    return schedule_for("device", artefact, train, Overrides(learning_rate=rate), held_out=gate)


class _DeviceTrials:
    """Updates of some users at one rate after another. Each process makes those of its share of users."""

    def __init__(
        self, training: Stage1Training, engine: UpdateEngine, users: Sequence[Sequence[Pair]]
    ) -> None:
        self._training, self._engine, self._count = training, engine, len(users)
        self._users = training.processes.mine(users)
        self._tests = [split_sizes(len(pairs), test_apart=False)[2] for pairs in self._users]
        self._artefact = _artefact(training)
        done = training.record.device_trials  # of an interrupted run
        seeds = [self._artefact.seed] * len(self._users)
        self._before = done[0]["before"] if done else self._mean(self._test_losses(seeds))

    def search(self) -> float:
        return Search(self._trial, self._before).run()

    def _trial(self, rate: float) -> float:
        record, progress = self._training.record, self._training.progress
        for done in record.device_trials:
            if done["learning_rate"] == rate:
                return done["after"]
        after = self._mean(self._update(rate))
        after = after if math.isfinite(after) else math.inf  # it diverged
        progress.say(f"device learning rate {rate:g}: held-out loss {self._before:.4f} -> {after:.4f}")
        record.device_trials.append(
            {"learning_rate": rate, "before": self._before, "after": after, "users": self._count}
        )
        self._training.save()
        return after

    def _mean(self, losses: Sequence[float]) -> float:
        """Over the users of all processes, which meet there."""
        self._training.pause()
        return self._training.processes.all_reduce(sum(losses)) / self._count

    def _update(self, rate: float) -> list[float]:
        """The losses on the test parts after an update."""
        processes, progress = self._training.processes, self._training.progress
        trainings = [
            Training.start(_schedule(self._artefact, pairs, rate), self._artefact.seed)
            for pairs in self._users
        ]
        past = [pairs[:-test] for pairs, test in zip(self._users, self._tests, strict=True)]
        try:
            for stepped in train_people(self._engine, self._artefact, past, trainings):
                latest = [trainings[i].schedule.work_of(trainings[i].step - 1) for i in stepped]
                examples = sum(latest) * processes.count
                progress.advance(examples, f"trying device learning rate {rate:g}")
                if processes.count == 1:  # others may take more steps, and a pause is a meeting
                    self._training.pause()
        except Diverged:
            return [math.inf]
        seed = self._artefact.seed
        return self._test_losses([each.outcome(seed) or seed for each in trainings])

    def _test_losses(self, tensors: Sequence[ShiftTensors]) -> list[float]:
        return [
            mean_loss(self._engine, self._artefact, pairs[-test:], personal)
            for pairs, test, personal in zip(self._users, self._tests, tensors, strict=True)
        ]
