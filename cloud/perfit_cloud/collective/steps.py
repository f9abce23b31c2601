"""What all training here is made of: batches of like length, one step, a loss, a schedule."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from perfit_cloud.collective.optimizer import StiefelAdam
from perfit_cloud.engine.gradients import Pair, group_all, make_batch, passes, target_log_likelihoods
from perfit_cloud.model.base import BaseModel
from perfit_cloud.model.shifts import Phi, Shift, to_torch
from perfit_shared.positions import Positions
from perfit_shared.shifts import LayerShift, ShiftTensors

__all__ = ["WARM_UP", "batches", "evaluate", "from_torch", "rate_at", "step", "trainable"]

WARM_UP = 0.1  # share of all steps
_POOL = 50  # batches that are sorted by length together


def trainable(tensors: ShiftTensors, device: torch.device) -> dict[int, Phi]:
    """Float32 leaves that require grad, U = 1 in front."""
    shift = to_torch(tensors, device)
    for phi in shift.values():
        for tensor in phi:
            tensor.requires_grad_()
    return shift


def from_torch(shift: Shift) -> ShiftTensors:
    """Back to numpy, a copy."""
    return ShiftTensors({
        layer: LayerShift(*(t.detach()[0].float().cpu().numpy().copy() for t in phi))
        for layer, phi in sorted(shift.items())
    })  # fmt: skip


def rate_at(index: int, total: int, peak: float) -> float:
    """Linear warm-up over the first tenth of `total` steps, then linear decay; never exactly 0."""
    warm = max(1, round(WARM_UP * total))
    if index < warm:
        return peak * (index + 1) / warm
    return peak * (total - index) / max(1, total - warm + 1)


def batches(lengths: Sequence[int], *, batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """Indices of all examples once, shuffled, in batches of like length so that padding is small.

    A function of its arguments alone, so an interrupted run finds its place again.
    """
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(lengths)).tolist()
    pool = _POOL * batch_size
    made = []
    for start in range(0, len(order), pool):
        near = sorted(order[start : start + pool], key=lambda i: lengths[i])
        made += [near[k : k + batch_size] for k in range(0, len(near), batch_size)]
    return [made[i] for i in rng.permutation(len(made))]


def step(
    base: BaseModel, pairs: Sequence[Pair], positions: Positions, *,
    collective: Shift, personal: Shift, optimizer: StiefelAdam, rate: float,
) -> float:  # fmt: skip
    """One step on a batch; returns its loss before the step, nats a target token.

    The base's hooks are on. Only blocks above the first intervened one are differentiated, since
    nothing below depends on a tensor that requires grad.
    """
    tokens = sum(len(target) for _, target in pairs)
    total = 0.0
    for chunk in passes(pairs):
        batch = make_batch([pairs[i] for i in chunk], positions, base.device)
        with torch.enable_grad():
            likelihoods = target_log_likelihoods(base, batch, group_all(batch, collective, personal))
            loss = -likelihoods.sum() / tokens
            if loss.requires_grad:  # not when every prompt is a single token
                loss.backward()  # type: ignore[no-untyped-call]
        total += float(loss.detach())
    optimizer.step(rate)
    return total


def evaluate(
    base: BaseModel, pairs: Sequence[Pair], positions: Positions, *,
    collective: Shift | None, personal: Shift | None,
) -> float:  # fmt: skip
    """Mean loss over all target tokens, nats; without a collective shift, the base model's."""
    total = 0.0
    for chunk in passes(pairs):
        batch = make_batch([pairs[i] for i in chunk], positions, base.device)
        groups = [] if collective is None else group_all(batch, collective, personal)
        with torch.no_grad():
            total -= float(target_log_likelihoods(base, batch, groups).sum())
    return total / sum(len(target) for _, target in pairs)
