"""Adam whose rotations stay on the Stiefel manifold {R : RRᵀ = I}, for training shifts in torch.

The device's optimizer does the same in numpy, so that what trials find here holds there. One step,
after clipping all gradients together to a global norm:

    W, b    p ← p − rate · m̂ / (√v̂ + ε)               Adam, no weight decay
    R       ξ = P_R(G) = G − sym(GRᵀ)R                 the gradient's part along the manifold
            m ← β₁ P_R(m) + (1 − β₁) ξ                 the old moment, carried to where R is now
            v ← β₂ v + (1 − β₂) mean(ξ²)               one number a row
            R ← qf(R − 4 · rate · P_R(m̂ / (√v̂ + ε)))   the Q of a QR decomposition, signs fixed

with sym(A) = (A + Aᵀ)/2. The retraction is that of Absil, Mahony and Sepulchre, "Optimization
Algorithms on Matrix Manifolds", section 4.1.1, written for orthonormal rows. No weight decay on
purpose: it pulls R off the manifold, and torch's `orthogonal` parametrization loses R to it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from perfit_cloud.model.interventions import Phi, Shift

__all__ = ["CLIP", "StiefelAdam", "retract", "tangent"]

CLIP = 0.3  # global norm of all gradients of a step (PerFit's setting)
_BETAS = (0.9, 0.999)
_EPS = 1e-8
_ROTATION_SCALE = 4.0  # as on the device, which measured it against torch's parametrization


def tangent(direction: Tensor, rotation: Tensor) -> Tensor:
    """The part of direction (…, r, d) that is tangent to the manifold at rotation (…, r, d)."""
    inner = direction @ rotation.mT  # (…, r, r)
    return direction - 0.5 * (inner + inner.mT) @ rotation


def retract(rotation: Tensor) -> Tensor:
    """The orthonormal rows that QR makes of (…, r, d); computed in float64, so that float32 rounding
    does not add up over thousands of steps."""
    q, upper = torch.linalg.qr(rotation.double().mT)  # (…, d, r), (…, r, r)
    diagonal = upper.diagonal(dim1=-2, dim2=-1)
    signs = torch.where(diagonal < 0, -1.0, 1.0).to(q.dtype)
    rows: Tensor = (q * signs.unsqueeze(-2)).mT
    return rows.contiguous().to(rotation.dtype)


class StiefelAdam:
    """Steps the tensors of `shifts` that require grad in place; a rotation that does not stays as it is.

    Call backward(), then `step(rate)`, which clips, moves and clears the gradients.
    """

    def __init__(self, shifts: Sequence[Shift], *, clip: float = CLIP) -> None:
        self._clip = clip
        phis: list[Phi] = [shift[layer] for shift in shifts for layer in sorted(shift)]
        self._rotations = [phi.rotation for phi in phis if phi.rotation.requires_grad]
        self._free = [tensor for phi in phis for tensor in (phi.source, phi.bias)]
        self._tensors = [*self._rotations, *self._free]
        self._first = [torch.zeros_like(t) for t in self._tensors]  # m
        self._second = [  # v: a number each, or for a rotation a number a row
            torch.zeros_like(t[..., :1] if i < len(self._rotations) else t)
            for i, t in enumerate(self._tensors)
        ]
        self._count = 0

    def gradients(self) -> list[Tensor]:
        """The gradient of every tensor, in a fixed order; zeros are put where there was none."""
        for tensor in self._tensors:
            if tensor.grad is None:
                tensor.grad = torch.zeros_like(tensor)
        return [tensor.grad for tensor in self._tensors if tensor.grad is not None]

    @torch.no_grad()
    def step(self, rate: float) -> float:
        """One step at learning rate `rate`; returns the global gradient norm before clipping.

        A tensor without a gradient counts as one whose gradient is zero.
        """
        grads = self.gradients()
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in grads))
        scale = min(1.0, self._clip / norm) if norm > 0 else 1.0
        self._count += 1
        for i, (tensor, raw) in enumerate(zip(self._tensors, grads, strict=True)):
            grad = raw * scale
            if i < len(self._rotations):
                self._first[i].copy_(tangent(self._first[i], tensor))
                direction = self._adam(i, tangent(grad, tensor), by_row=True)
                tensor.copy_(retract(tensor - _ROTATION_SCALE * rate * tangent(direction, tensor)))
            else:
                tensor.sub_(self._adam(i, grad), alpha=rate)
            tensor.grad = None
        return norm

    def _adam(self, i: int, grad: Tensor, *, by_row: bool = False) -> Tensor:
        """Adam's bias-corrected direction m̂ / (√v̂ + ε); the moments move on."""
        first, second = _BETAS
        square = grad.square().mean(-1, keepdim=True) if by_row else grad.square()
        self._first[i].lerp_(grad, 1 - first)
        self._second[i].mul_(second).add_(square, alpha=1 - second)
        m = self._first[i] / (1 - first**self._count)
        v = self._second[i] / (1 - second**self._count)
        return m / (v.sqrt() + _EPS)

    def state(self) -> dict[str, Any]:
        """Moments and step count, for a checkpoint; the tensors themselves are the caller's."""
        return {"count": self._count, "first": self._first, "second": self._second}

    def load(self, state: dict[str, Any]) -> None:
        """Continue from `state()`."""
        self._count = int(state["count"])
        for own, saved in ((self._first, state["first"]), (self._second, state["second"])):
            for tensor, value in zip(own, saved, strict=True):
                tensor.copy_(value)
