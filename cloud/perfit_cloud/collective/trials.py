"""Learning rates chosen by trying: stage 1's on the validation slice, the devices' on single users."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from perfit_cloud.collective.optimizer import StiefelAdam
from perfit_cloud.collective.steps import batches, from_torch, rate_at, trainable
from perfit_cloud.collective.training import FORWARD, Training
from perfit_cloud.engine.gradients import Pair

__all__ = ["DEVICE_FACTOR", "choose_device_rate", "choose_rate", "device_users", "telling", "trial_steps"]

# From what suits billions of parameters (PerFit) past what suits millions (about 1e-3 at 8M).
LADDER = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
_FIRST = (1, 2, 3)  # rungs of stage 1 that are tried in any case
_DEVICE_FIRST = (2, 3, 4)  # a user has few steps, so more of each
DEVICE_FACTOR = 5.0  # of stage 1's rate, where trial updates tell nothing
_TELLING = 0.01  # least gain of the best trial, as a share of the loss before it
_SHARE = 0.05  # of all steps, one trial: shorter ones favour low rates
_LEAST, _MOST = 4, 60  # steps of one trial
_LEAST_EXAMPLES = 15  # of a user whose update is simulated
_USERS = 3


def trial_steps(training: Training) -> int:
    """Steps of one trial."""
    return max(_LEAST, min(_MOST, round(_SHARE * training.steps)))


def choose_rate(training: Training) -> None:
    """Set `record.learning_rate` and `record.trials`: short runs from the start over the same batches.

    Trials that an interrupted run has done are not repeated. Ends with a checkpoint.
    """
    record = training.record
    if training.settings.learning_rate is not None:
        record.learning_rate = training.settings.learning_rate
    if record.learning_rate:
        return
    best = _search(_FIRST, lambda rung: _trial(training, rung))
    record.learning_rate = LADDER[best]
    training.progress.say(f"learning rate {LADDER[best]:g}")
    training.save()


def _search(first: Sequence[int], loss_of: Callable[[int], float]) -> int:
    """The best rung of LADDER: of `first`, and onwards while the best so far lies at an edge."""
    losses = {rung: loss_of(rung) for rung in first}
    while True:
        best = min(losses, key=losses.__getitem__)
        beyond = [rung for rung in (best - 1, best + 1) if rung not in losses and 0 <= rung < len(LADDER)]
        if not beyond:
            return best
        losses[beyond[0]] = loss_of(beyond[0])


def _trial(training: Training, rung: int) -> float:
    rate, record = LADDER[rung], training.record
    for done in record.trials:
        if done["learning_rate"] == rate:
            return done["validation_loss"]
    collective, personal, optimizer = training.fresh()
    steps = trial_steps(training)
    for index in range(steps):
        pairs = training.batch(index)
        training.losses.step(
            pairs, collective=collective, personal=personal, optimizer=optimizer,
            rate=rate_at(index, steps, rate),
        )  # fmt: skip
        training.progress.advance(len(pairs), f"trying learning rate {rate:g}: step {index + 1}/{steps}")
        training.pause()
    validation = training.corpus.validation
    loss = training.losses.mean(validation, collective=collective, personal=personal)
    loss = loss if math.isfinite(loss) else math.inf  # it diverged
    training.progress.advance(FORWARD * len(validation), f"trying learning rate {rate:g}")
    training.progress.say(f"learning rate {rate:g}: validation loss {loss:.4f} after {steps} steps")
    record.trials.append({"learning_rate": rate, "validation_loss": loss, "steps": steps})
    return loss


# -- devices -----------------------------------------------------------------------------------------


def device_users(training: Training) -> list[list[Pair]]:
    """Pairs of the largest training users, those with enough examples for an update."""
    large = [pairs for pairs in training.corpus.train.values() if len(pairs) >= _LEAST_EXAMPLES]
    return sorted(large, key=len, reverse=True)[:_USERS]


def choose_device_rate(training: Training) -> float:
    """The devices' learning rate: given, else the candidate with the lowest mean held-out loss.

    Simulates stage 2 (φ₁ frozen, φ₂ from the seed) on the earlier three quarters of each user and
    measures on the rest; appends to `record.device_trials`, each with the losses before and after.
    Those users were part of stage 1 (and perhaps of the base model's training), so the losses
    flatter; only their order is used. Where no trial gains 1 %, or nobody has enough examples,
    it is DEVICE_FACTOR times stage 1's rate.
    """
    if training.settings.device_learning_rate is not None:
        return training.settings.device_learning_rate
    record = training.record
    users = device_users(training)
    if users:
        rung = _search(_DEVICE_FIRST, lambda rung: _device_trial(training, users, rung))
        if telling(record.device_trials):
            return LADDER[rung]
    return DEVICE_FACTOR * record.learning_rate


def telling(device_trials: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the best of these trials gained enough to rank the rates."""
    return any(done["after"] < (1 - _TELLING) * done["before"] for done in device_trials)


def _device_trial(training: Training, users: Sequence[Sequence[Pair]], rung: int) -> float:
    rate, record = LADDER[rung], training.record
    for done in record.device_trials:
        if done["learning_rate"] == rate:
            return done["after"]
    losses = np.mean([_update(training, pairs, rate) for pairs in users], axis=0)
    before, after = float(losses[0]), float(losses[1])
    after = after if math.isfinite(after) else math.inf  # it diverged
    training.progress.say(f"device learning rate {rate:g}: held-out loss {before:.4f} -> {after:.4f}")
    record.device_trials.append({
        "learning_rate": rate, "before": before, "after": after, "users": len(users),
    })  # fmt: skip
    training.save()
    return after


def _update(training: Training, pairs: Sequence[Pair], rate: float) -> tuple[float, float]:
    """(held-out loss at the seed, after an update) of one user."""
    settings = training.settings
    cut = len(pairs) * 3 // 4
    past, latest = pairs[:cut], pairs[cut:]
    collective = {layer: type(phi)(*(t.detach() for t in phi)) for layer, phi in training.collective.items()}
    personal = trainable(from_torch(training.personal), training.base.device)
    optimizer = StiefelAdam([personal])

    def held_out() -> float:
        return training.losses.mean(latest, collective=collective, personal=personal)

    before = held_out()
    lengths = [len(prompt) + len(target) for prompt, target in past]
    plan = [
        batch
        for epoch in range(settings.device_epochs)
        for batch in batches(lengths, batch_size=settings.batch_size, seed=settings.seed, epoch=epoch)
    ]
    for index, batch in enumerate(plan):
        training.losses.step(
            [past[i] for i in batch], collective=collective, personal=personal, optimizer=optimizer,
            rate=rate_at(index, len(plan), rate),
        )  # fmt: skip
        training.progress.advance(len(batch), f"trying device learning rate {rate:g}")
        training.pause()
    return before, held_out()
