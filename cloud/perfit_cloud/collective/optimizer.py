"""The shared optimizer's step in torch, on the device where stage 1 trains.

`perfit_shared.optimizer` has the formulas; a test holds the two together. W and b take Adam steps, R one
along the Stiefel manifold, all gradients are clipped together.

Why there are two. Random shifts of Llama-2-7B's shapes with gradients at hand, one step of both shifts, one
thread of an AMD EPYC (`python scripts/bench/optimizer.py`):

    preset             layers   ranks    numpy    torch
    news_headline           3    32/4    27 ms    45 ms
    news_categorize         3   16/32    35 ms    48 ms
    movie_tagging           2    32/4    14 ms    25 ms

On a CPU either is nothing beside a pass over 7B parameters, which takes minutes. On a GPU it is not: a
pass over 16 examples of 64 tokens is 14 TFLOP forward and less backward, 30 to 60 ms by arithmetic on an
accelerator that does 500 TFLOP/s. Numpy would add its step and a copy of 3 to 5 MB each way: a quarter of
that and more, where 5 % were allowed. No GPU was there to measure either on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from perfit_cloud.model.interventions import Phi, Shift
from perfit_shared.optimizer import ROTATION_SCALE, OptimizerConfig

__all__ = ["CLIP", "StiefelAdam", "retract", "tangent"]

CLIP = OptimizerConfig.clip  # global norm of all gradients of a step (PerFit's setting)
_BETAS = (OptimizerConfig.beta1, OptimizerConfig.beta2)


def tangent(direction: Tensor, rotation: Tensor) -> Tensor:
    """The part of direction (…, r, d) that is tangent to the manifold at rotation (…, r, d)."""
    inner = direction @ rotation.mT  # (…, r, r)
    return direction - 0.5 * (inner + inner.mT) @ rotation


def retract(moved: Tensor) -> Tensor:
    """The rows of moved (…, r, d) made orthonormal as by QR; in float64, so that errors do not add up.

    With MMᵀ = LLᵀ (Cholesky) the rows are L⁻¹M, in a fraction of Householder's time.
    """
    wide = moved.double()
    lower = torch.linalg.cholesky(wide @ wide.mT)  # (…, r, r)
    rows: Tensor = torch.linalg.solve_triangular(lower, wide, upper=False)
    return rows.to(moved.dtype)


class StiefelAdam:
    """Steps the tensors of `shifts` that require grad in place; a rotation that does not stays as it is.

    Call backward(), then `step(rate)`, which clips, moves and clears the gradients.
    """

    def __init__(self, shifts: Sequence[Shift]) -> None:
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
        norm = math.sqrt(float(torch.stack([g.double().square().sum() for g in grads]).sum()))
        scale = min(1.0, CLIP / (norm + 1e-6))
        self._count += 1
        for i, (tensor, raw) in enumerate(zip(self._tensors, grads, strict=True)):
            grad = raw * scale
            if i < len(self._rotations):
                self._first[i].copy_(tangent(self._first[i], tensor))
                direction = self._adam(i, tangent(grad, tensor), by_row=True)
                tensor.copy_(retract(tensor - ROTATION_SCALE * rate * tangent(direction, tensor)))
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
        return m / (v.sqrt() + OptimizerConfig.epsilon)

    def state(self) -> dict[str, Any]:
        """Moments and step count, for a checkpoint; the tensors themselves are the caller's."""
        return {"count": self._count, "first": self._first, "second": self._second}

    def load(self, state: dict[str, Any]) -> None:
        """Continue from `state()`."""
        self._count = int(state["count"])
        for own, saved in ((self._first, state["first"]), (self._second, state["second"])):
            for tensor, value in zip(own, saved, strict=True):
                tensor.copy_(value)
