"""What all training here is made of: batches of like length, steps and losses, a schedule."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from perfit_cloud.collective.forward import Forward, PairKey, pair_key
from perfit_cloud.collective.optimizer import StiefelAdam
from perfit_cloud.collective.processes import Processes
from perfit_cloud.engine.gradients.batch import Pair
from perfit_cloud.model.interventions import Phi, Shift, to_torch
from perfit_shared.optimizer import OptimizerConfig, learning_rate_at
from perfit_shared.shifts import LayerShift, ShiftTensors

__all__ = ["WARM_UP", "Losses", "batches", "from_torch", "rate_at", "spread", "trainable"]

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


def rate_at(index: int, total: int, peak: float, *, schedule: str = "paper") -> float:
    """The rate of step `index` of `total`, by one of `perfit_shared.optimizer`'s schedules."""
    return learning_rate_at(index, OptimizerConfig(peak, total, warm_up=WARM_UP, schedule=schedule))


def batches(lengths: Sequence[int], *, batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """Indices of all examples once, shuffled, in batches of like length so that padding is small.

    A function of its arguments alone, so an interrupted run resumes with the same batches.
    """
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(lengths)).tolist()
    pool = _POOL * batch_size
    made = []
    for start in range(0, len(order), pool):
        near = sorted(order[start : start + pool], key=lambda i: lengths[i])
        made += [near[k : k + batch_size] for k in range(0, len(near), batch_size)]
    return [made[i] for i in rng.permutation(len(made))]


def spread(plans: Sequence[Sequence[Sequence[int]]], processes: int) -> list[int]:
    """Each example's process, about as many of every batch on each. `plans`: the batches of every epoch.

    An example stays on one process for all epochs, since that process has its activations.
    """
    examples = sum(map(len, plans[0]))
    batch_of = np.zeros((len(plans), examples), dtype=np.int64)
    for epoch, plan in enumerate(plans):
        for number, batch in enumerate(plan):
            batch_of[epoch, batch] = number
    taken = np.zeros((len(plans), max(map(len, plans)), processes), dtype=np.int64)
    homes = [0] * examples
    epochs = np.arange(len(plans))
    for example in (i for batch in plans[0] for i in batch):
        loads = taken[epochs, batch_of[:, example]]  # (epochs, processes)
        homes[example] = int(loads.sum(0).argmin())
        taken[epochs, batch_of[:, example], homes[example]] += 1
    return homes


class Losses:
    """Losses and steps on batches: split over processes, micro-batches and passes."""

    def __init__(self, forward: Forward, *, processes: Processes, accumulate: int = 1) -> None:
        self._forward, self._processes, self._accumulate = forward, processes, accumulate
        self._homes: dict[PairKey, int] = {}

    def cache(self, pairs: Sequence[Pair], homes: Sequence[int], done: Callable[[int], None]) -> None:
        """Cache what no step changes of those pairs whose process this is; it gets them from now on."""
        self._homes = {pair_key(pair): home for pair, home in zip(pairs, homes, strict=True)}
        self._forward.cache(self._mine(pairs), done)

    def _mine(self, pairs: Sequence[Pair]) -> Sequence[Pair]:
        """This process's share of a batch: pairs that it caches, and of others every count-th."""
        homes = [self._homes.get(pair_key(pair)) for pair in pairs]
        if None in homes:
            return self._processes.mine(pairs)
        return [pair for pair, home in zip(pairs, homes, strict=True) if home == self._processes.index]

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
        loss = self._processes.all_reduce(loss, optimizer.gradients())
        optimizer.step(rate)
        return loss

    def backward(self, pairs: Sequence[Pair], *, collective: Shift, personal: Shift) -> float:
        """Add the gradient of this process's share of the pairs' loss to the leaves; returns its loss."""
        tokens = sum(len(target) for _, target in pairs)
        mine = self._mine(pairs)
        parts = min(self._accumulate, len(mine))
        loss = 0.0
        for k in range(parts):
            part = mine[k * len(mine) // parts : (k + 1) * len(mine) // parts]
            loss += self._forward.loss(part, collective, personal, 1 / tokens)
        return loss / tokens

    def mean(self, pairs: Sequence[Pair], *, collective: Shift | None, personal: Shift | None) -> float:
        """Mean loss over all target tokens, nats; without a collective shift, the base model's."""
        mine = self._mine(pairs)
        total = self._forward.loss(mine, collective, personal, None) if mine else 0.0
        return self._processes.all_reduce(total) / sum(len(target) for _, target in pairs)
