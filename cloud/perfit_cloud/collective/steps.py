"""What all training here is made of: batches of like length, steps and losses, a schedule."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from perfit_cloud.collective.frozen import FrozenBase
from perfit_cloud.collective.optimizer import StiefelAdam
from perfit_cloud.collective.processes import Processes
from perfit_cloud.engine.gradients.batch import Pair, group_all, make_batch, passes
from perfit_cloud.model.interventions import Phi, Shift, to_torch
from perfit_shared.optimizer import OptimizerConfig, learning_rate_at
from perfit_shared.positions import Positions
from perfit_shared.shifts import LayerShift, ShiftTensors

__all__ = ["WARM_UP", "Losses", "batches", "from_torch", "rate_at", "trainable"]

WARM_UP = 0.1  # share of all steps
_POOL = 50  # batches that are sorted by length together


def trainable(tensors: ShiftTensors, device: torch.device, *, rotations: bool = True) -> dict[int, Phi]:
    """Float32 leaves that require grad (R only with `rotations`), U = 1 in front."""
    shift = to_torch(tensors, device)
    for phi in shift.values():
        for tensor in phi if rotations else (phi.source, phi.bias):
            tensor.requires_grad_()
    return shift


def from_torch(shift: Shift) -> ShiftTensors:
    """Back to numpy, a copy."""
    return ShiftTensors(
        {
            layer: LayerShift(*(t.detach()[0].float().cpu().numpy().copy() for t in phi))
            for layer, phi in sorted(shift.items())
        }
    )


def rate_at(index: int, total: int, peak: float, *, schedule: str = "device") -> float:
    """The rate of step `index` of `total`, by one of `perfit_shared.optimizer`'s schedules."""
    return learning_rate_at(index, OptimizerConfig(peak, total, warm_up=WARM_UP, schedule=schedule))


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


class Losses:
    """Losses and steps on batches: split over processes, micro-batches and passes.

    The base's hooks are on. Only blocks above the first intervened one are differentiated, since
    nothing below depends on a tensor that requires grad.
    """

    def __init__(
        self,
        frozen: FrozenBase,
        positions: Positions,
        device: torch.device,
        *,
        processes: Processes,
        accumulate: int = 1,
    ) -> None:
        self._frozen, self._positions, self._device = frozen, positions, device
        self._processes, self._accumulate = processes, accumulate

    def step(
        self,
        pairs: Sequence[Pair],
        *,
        collective: Shift,
        personal: Shift,
        optimizer: StiefelAdam,
        rate: float,
    ) -> float:
        """One step on a batch; returns its loss before the step, nats a target token.

        Each process adds up the gradient of its pairs, weighted by their share of all target tokens,
        over its micro-batches. The sum over processes is the gradient of the whole batch, so all
        take the same step, and how many there are changes nothing but rounding.
        """
        loss = self.backward(pairs, collective=collective, personal=personal)
        loss = self._processes.add_up(loss, optimizer.gradients())
        optimizer.step(rate)
        return loss

    def backward(self, pairs: Sequence[Pair], *, collective: Shift, personal: Shift) -> float:
        """Add the gradient of this process's share of the pairs' loss to the leaves; returns its loss."""
        tokens = sum(len(target) for _, target in pairs)
        mine = self._processes.mine(pairs)
        parts = min(self._accumulate, len(mine))
        loss = 0.0
        for k in range(parts):
            for chunk in self._chunks(mine[k * len(mine) // parts : (k + 1) * len(mine) // parts]):
                with torch.enable_grad():
                    part = -self._log_likelihoods(chunk, collective, personal).sum() / tokens
                    if part.requires_grad:  # not when every prompt is a single token
                        part.backward()  # type: ignore[no-untyped-call]
                loss += float(part.detach())
        return loss

    def mean(self, pairs: Sequence[Pair], *, collective: Shift | None, personal: Shift | None) -> float:
        """Mean loss over all target tokens, nats; without a collective shift, the base model's."""
        total = 0.0
        for chunk in self._chunks(self._processes.mine(pairs)):
            with torch.no_grad():
                total -= float(self._log_likelihoods(chunk, collective, personal).sum())
        return self._processes.add_up(total) / sum(len(target) for _, target in pairs)

    def _chunks(self, pairs: Sequence[Pair]) -> list[list[Pair]]:
        """What fits into a pass each."""
        return [[pairs[i] for i in chunk] for chunk in passes(pairs, self._frozen.batching)]

    def _log_likelihoods(
        self, pairs: Sequence[Pair], collective: Shift | None, personal: Shift | None
    ) -> Tensor:
        batch = make_batch(pairs, self._positions, self._device)
        groups = [] if collective is None else group_all(batch, collective, personal)
        return self._frozen.log_likelihoods(pairs, batch, groups)
