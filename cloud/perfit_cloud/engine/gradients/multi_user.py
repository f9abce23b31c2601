"""One forward and backward pass for U users, each with tensors and a loss of their own.

Their tensors are stacked (U, r, d). No row of one user meets a row of another, so the gradient of
the sum of their losses holds everybody's own gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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

__all__ = ["PassResult", "UserBatch", "pass_from_cache", "pass_in_full"]

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class UserBatch:
    """Whose tensors a pass runs with; all have the shapes of one spec."""

    collective: Shift  # by layer; empty: nothing is shifted
    personal: Sequence[ShiftTensors | None]  # U; None, of all: the collective shift alone
    weights: Sequence[float] | None  # of each user's summed −log p in the loss; None: no gradients

    @property
    def differentiates(self) -> bool:
        return self.weights is not None

    def stacked(self, device: torch.device) -> dict[int, Phi] | None:
        """The personal tensors by layer (U, …), as leaves that require a gradient if there are weights."""
        everyone = [tensors for tensors in self.personal if tensors is not None]
        if not everyone:
            return None
        if len(everyone) != len(self.personal):  # one user's tensors would reach the others
            raise ValueError("users with personal tensors share no pass with users without")

        def leaf(arrays: Sequence[npt.NDArray[np.float32]]) -> Tensor:
            return torch.from_numpy(np.stack(arrays)).to(device).requires_grad_(self.differentiates)

        return {
            layer: Phi(*map(leaf, zip(*(tensors.layers[layer] for tensors in everyone), strict=True)))
            for layer in sorted(self.collective)
        }

    def weights_of(self, owners: Indices, device: torch.device) -> Tensor | None:
        """The weight of each of these (n,) owners' values, float32."""
        if self.weights is None:
            return None
        return torch.from_numpy(np.array(self.weights, np.float32)[owners]).to(device)


class PassResult(NamedTuple):
    """What one pass found."""

    losses: Floats  # (B,) −log p summed over each example's target tokens, nats
    gradients: dict[int, LayerShift]  # by layer (U, …); empty where nothing was differentiated


def pass_from_cache(
    decoder: PartialDecoder, parts: Sequence[Part], owners: Sequence[int], users: UserBatch
) -> PassResult:
    """Run the blocks above the first intervened one. `owners` (ascending) says whose each part is."""
    device = parts[0].cache.hidden.device
    joined = join(parts, owners, device)
    with torch.set_grad_enabled(users.differentiates):
        personal = users.stacked(device)
        hidden = joined.run(decoder, users.collective, personal)
    weights = users.weights_of(joined.label_owners, device)
    losses, seed = decoder.losses(hidden.detach(), joined.labels, weights)
    targets = np.concatenate([part.examples.targets[part.which] for part in parts])
    examples = np.repeat(np.arange(len(targets)), targets)  # whose each target token is
    # bincount adds in the order of the tokens, on any device.
    sums = np.bincount(examples, losses.double().cpu().numpy(), len(targets)).astype(np.float64)
    return PassResult(sums, _differentiate(hidden, personal, seed if users.differentiates else None))


def pass_in_full(
    base: BaseModel, pairs: Sequence[Pair], owners: Indices, users: UserBatch, positions: Positions
) -> PassResult:
    """Run all of the model, whose hooks are on. `owners` says whose each pair is.

    With several users, each has an intervened token; a single one may have none.
    """
    device = base.device
    batch = make_batch(pairs, positions, device)
    rows: list[list[int]] = [[] for _ in users.personal]
    for owner, of_pair in zip(owners.tolist(), batch.rows, strict=True):
        rows[owner] += of_pair
    with torch.set_grad_enabled(users.differentiates):
        personal, groups = None, []
        if users.collective and any(rows):
            personal = users.stacked(device)
            groups.append(ShiftGroup(*row_index(rows, device), users.collective, personal))
        losses = -target_log_likelihoods(base, batch, groups).sum(1)  # (B,)
    gradients = _differentiate(losses, personal, users.weights_of(owners, device))
    return PassResult(losses.detach().double().cpu().numpy(), gradients)


def _differentiate(outputs: Tensor, personal: Shift | None, seed: Tensor | None) -> dict[int, LayerShift]:
    """Gradient of (outputs · seed) summed, by layer (U, …); none without tensors or weights."""
    if personal is None or seed is None:
        return {}
    leaves = [tensor for phi in personal.values() for tensor in phi]
    found = iter(torch.autograd.grad(outputs, leaves, seed))
    return {layer: LayerShift(*(next(found).cpu().numpy() for _ in phi)) for layer, phi in personal.items()}
