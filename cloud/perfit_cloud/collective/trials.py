"""Learning rates chosen by trying: stage 1's on the validation slice, the devices' on single users.

Both walk one ladder, in decades first and then in half decades around the best, on as many steps as
tell one rate from another. Of rates that do about equally well the lowest is taken: a rate that is
too low costs some of the gain, one that is too high spoils the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from perfit_cloud.collective.optimizer import StiefelAdam
from perfit_cloud.collective.steps import batches, from_torch, rate_at, trainable
from perfit_cloud.collective.training import FORWARD, Stage1Training
from perfit_cloud.engine.gradients.batch import Pair

__all__ = [
    "Search",
    "choose_device_rate",
    "choose_rate",
    "device_work",
    "telling",
    "trial_steps",
    "trial_work",
]

# From below what suits billions of parameters (PerFit: 1e-4) past what suits millions (1e-3 at 8M).
LADDER = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
_FIRST = (1e-4, 1e-3)
_TRIED = 5  # rates, in most searches
_TIE = 0.9  # a rate with this share of the best one's gain is as good
_TELLING = 0.002  # least gain of the best trial update, as a share of the loss before it
_SHARE = 0.1  # of all steps, one trial
_LEAST, _MOST = 20, 100  # steps of one trial, and most of them never more than the run itself has
_HOPELESS = 1.02  # half-way validation loss over the untouched model's, where a trial ends
_DEVICE_SHARE = 0.2  # of stage 1's work, one device rate; at least two users in any case
_LEAST_UPDATES = 20  # steps of a simulated update, by smaller batches where there are few examples


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
    return _TRIED * (step + 2 * FORWARD * len(training.corpus.validation))


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
            if loss > _HOPELESS * training.start_loss():
                break
    training.progress.say(f"learning rate {rate:g}: validation loss {loss:.4f} after {taken} steps")
    record.trials.append({"learning_rate": rate, "validation_loss": loss, "steps": taken})
    training.save()
    return loss


# -- devices -----------------------------------------------------------------------------------------


def device_users(training: Stage1Training) -> list[list[Pair]]:
    """Histories whose updates are simulated: as many as one rate may cost, at least two if there are.

    All of them in a private run: how many examples were trained on may decide nothing that is told.
    """
    if training.privacy is not None:
        return list(training.corpus.histories.values())
    work = _DEVICE_SHARE * len(training.examples) * training.settings.epochs
    chosen: list[list[Pair]] = []
    for pairs in training.corpus.histories.values():
        work -= len(pairs) * training.settings.device_epochs
        if len(chosen) >= 2 and work < 0:
            break
        chosen.append(pairs)
    return chosen


def device_work(training: Stage1Training) -> float:
    """Units of all trial updates, about."""
    examples = sum(len(pairs) * 3 // 4 for pairs in device_users(training))
    return _TRIED * examples * training.settings.device_epochs


def choose_device_rate(training: Stage1Training) -> float:
    """The devices' learning rate: given, else the one with the lowest mean held-out loss, or near it.

    Simulates stage 2 (φ₁ frozen, φ₂ from the seed) on the earlier three quarters of each history and
    measures on the rest; appends to `record.device_trials`, each with the losses before and after.
    Users held out of stage 1 come first; the losses of others flatter. Where no trial gains enough
    to rank the rates, or nobody has enough examples, it is never above stage 1's rate.
    """
    record = training.record
    if training.settings.device_learning_rate is not None:
        return training.settings.device_learning_rate
    users = device_users(training)
    if not users:
        return record.learning_rate
    before = _seed_loss(training, users)
    rate = Search(lambda tried: _device_trial(training, users, tried, before=before), before).run()
    return rate if telling(record.device_trials) else min(rate, record.learning_rate)


def telling(device_trials: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the best of these trials gained enough to rank the rates."""
    return any(done["after"] < (1 - _TELLING) * done["before"] for done in device_trials)


def _seed_loss(training: Stage1Training, users: Sequence[Sequence[Pair]]) -> float:
    """Mean held-out loss before an update."""
    if training.record.device_trials:  # of an interrupted run
        return training.record.device_trials[0]["before"]
    collective, personal = training.collective, training.personal
    losses = [
        training.losses.mean(_split(pairs)[1], collective=collective, personal=personal) for pairs in users
    ]
    return float(np.mean(losses))


def _device_trial(
    training: Stage1Training, users: Sequence[Sequence[Pair]], rate: float, *, before: float
) -> float:
    record = training.record
    for done in record.device_trials:
        if done["learning_rate"] == rate:
            return done["after"]
    after = float(np.mean([_update(training, pairs, rate) for pairs in users]))
    after = after if math.isfinite(after) else math.inf  # it diverged
    training.progress.say(f"device learning rate {rate:g}: held-out loss {before:.4f} -> {after:.4f}")
    record.device_trials.append(
        {
            "learning_rate": rate,
            "before": before,
            "after": after,
            "users": len(users),
        }
    )
    training.save()
    return after


def _split(pairs: Sequence[Pair]) -> tuple[Sequence[Pair], Sequence[Pair]]:
    """(what an update trains on, the latest quarter)."""
    cut = len(pairs) * 3 // 4
    return pairs[:cut], pairs[cut:]


def _update(training: Stage1Training, pairs: Sequence[Pair], rate: float) -> float:
    """The held-out loss of one user after an update."""
    settings = training.settings
    past, latest = _split(pairs)
    collective = {layer: type(phi)(*(t.detach() for t in phi)) for layer, phi in training.collective.items()}
    personal = trainable(from_torch(training.personal), training.base.device)
    optimizer = StiefelAdam([personal])
    lengths = [len(prompt) + len(target) for prompt, target in past]
    # As many steps as a device's longer history would take: a handful cannot show that a rate is too high.
    size = max(1, min(settings.batch_size, len(past) * settings.device_epochs // _LEAST_UPDATES))
    plan = [
        batch
        for epoch in range(settings.device_epochs)
        for batch in batches(lengths, batch_size=size, seed=settings.seed, epoch=epoch)
    ]
    for index, batch in enumerate(plan):
        training.losses.step(
            [past[i] for i in batch],
            collective=collective,
            personal=personal,
            optimizer=optimizer,
            rate=rate_at(index, len(plan), rate),
        )
        training.progress.advance(len(batch), f"trying device learning rate {rate:g}")
        training.pause()
    return training.losses.mean(latest, collective=collective, personal=personal)
