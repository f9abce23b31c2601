"""One forward and backward pass for U users, each with tensors and a loss of their own.

Their tensors are stacked (U, r, d). No row of one user meets a row of another, so the gradient of
the sum of their losses holds everybody's own gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from perfit_cloud.engine.gradients.activation_cache import Part, join
from perfit_cloud.engine.gradients.batch import Pair, make_batch, target_log_likelihoods
from perfit_cloud.model.base import BaseModel
from perfit_cloud.model.interventions import Phi, Shift, ShiftGroup, row_index
from perfit_cloud.model.partial import Indices, PartialDecoder
from perfit_shared.positions import Positions
from perfit_shared.shifts import LayerShift, ShiftTensors

__all__ = ["PassResult", "UserBatch", "pass_from_kept", "pass_in_full"]

Floats = npt.NDArray[np.float64]


class UserBatch(NamedTuple):
    """Whose tensors a pass runs with; all have the shapes of one spec."""

    collective: Shift
    personal: Sequence[ShiftTensors]  # U
    weights: Sequence[float] | None  # of each user's summed −log p in the loss; None: no gradients

    def stacked(self, device: torch.device) -> dict[int, Phi]:
        """By layer (U, …), leaves that want a gradient if there are weights."""
        return {
            layer: Phi(
                *(
                    torch.from_numpy(np.stack(arrays)).to(device).requires_grad_(self.weights is not None)
                    for arrays in zip(*(p.layers[layer] for p in self.personal), strict=True)
                )
            )
            for layer in sorted(self.collective)
        }

    def weights_of(self, owners: Indices, device: torch.device) -> Tensor | None:
        """The weight of each of these (n,) owners' values, float32."""
        if self.weights is None:
            return None
        return torch.from_numpy(np.array(self.weights, np.float32)[owners]).to(device)


class PassResult(NamedTuple):
    sums: Floats  # (U,) −log p summed over a user's target tokens, nats
    gradients: dict[int, LayerShift]  # by layer (U, …); empty without weights


def pass_from_kept(
    tail: PartialDecoder, parts: Sequence[Part], owners: Sequence[int], users: UserBatch
) -> PassResult:
    """The blocks above the first intervened one; `owners` (ascending) says whose each part is."""
    device = parts[0].kept.hidden.device
    joined = join(parts, owners, device)
    with torch.set_grad_enabled(users.weights is not None):
        personal = users.stacked(device)
        hidden = joined.run(tail, users.collective, personal)
    weights = users.weights_of(joined.label_owners, device)
    losses, seed = tail.losses(hidden.detach(), joined.labels, weights)
    gradients = {} if weights is None else _differentiate(hidden, personal, seed)
    return PassResult(_sums(losses, joined.label_owners, len(users.personal)), gradients)


def pass_in_full(
    base: BaseModel, pairs: Sequence[Pair], owners: Sequence[int], users: UserBatch, positions: Positions
) -> PassResult:
    """All of the model, whose hooks are on; `owners` says whose each pair is, and nobody has none."""
    device = base.device
    batch = make_batch(pairs, positions, device)
    rows: list[list[int]] = [[] for _ in users.personal]
    for owner, of_pair in zip(owners, batch.rows, strict=True):
        rows[owner] += of_pair
    with torch.set_grad_enabled(users.weights is not None):
        personal = users.stacked(device)
        group = ShiftGroup(*row_index(rows, device), users.collective, personal)
        sums = -target_log_likelihoods(base, batch, [group]).sum(1)  # (B,)
    weights = users.weights_of(np.array(owners), device)
    gradients = {} if weights is None else _differentiate(sums, personal, weights)
    return PassResult(_sums(sums.detach(), np.array(owners), len(users.personal)), gradients)


def _sums(values: Tensor, owners: Indices, users: int) -> Floats:
    """Values (n,) added up by owner, (users,) in float64; in their order, on any device."""
    return np.asarray(np.bincount(owners, values.double().cpu().numpy(), users), dtype=np.float64)


def _differentiate(outputs: Tensor, personal: Shift, seed: Tensor) -> dict[int, LayerShift]:
    """Gradient of (outputs · seed) summed, by layer (U, …)."""
    leaves = [tensor for phi in personal.values() for tensor in phi]
    found = iter(torch.autograd.grad(outputs, leaves, seed))
    return {layer: LayerShift(*(next(found).cpu().numpy() for _ in phi)) for layer, phi in personal.items()}
