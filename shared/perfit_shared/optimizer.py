"""AdamW on the Stiefel manifold, in numpy: how a personal shift takes a step.

W (r, d) and b (r) take plain Adam steps. R (r, d) has orthonormal rows and has to keep them:

    G  ← clip(∂loss/∂R)                         by the global norm over all tensors
    ξ  = P_R(G) = G − sym(G Rᵀ) R               the gradient's part along the manifold
    m  ← β₁ P_R(m) + (1 − β₁) ξ                 the old moment, carried to where R is now
    v  ← β₂ v + (1 − β₂) mean(ξ²)               one number a row: coordinates along the manifold
                                                have no axes of their own to adapt to
    R  ← qf(R − 4 · lr · P_R(m̂ / (√v̂ + ε)))     QR retraction, signs fixed

No weight decay: on R it has no meaning (torch's `orthogonal` with AdamW's decay zeroes a
non-square R after one step), and PerFit's reference stack trains without it in effect.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.numpy

from perfit_shared.errors import InvalidData, InvalidInput
from perfit_shared.shifts import LayerShift, ShiftTensors

__all__ = ["OptimizerConfig", "StiefelAdamW", "learning_rate_at"]

Array = npt.NDArray[np.float32]
# Torch's Householder coordinates move R about twice as far for one lr; on small random problems 4
# ends below it on average for rates up to 5e-2 (2 ends 2 to 5 % above, 6 diverges at the top).
_ROTATION_SCALE = 4.0


@dataclass(frozen=True)
class OptimizerConfig:
    """Raises InvalidInput on a rate or a length that cannot train."""

    learning_rate: float  # peak
    total_steps: int
    warm_up: float = 0.1  # share of the steps
    clip: float = 0.3  # global gradient norm
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8

    def __post_init__(self) -> None:
        if not (math.isfinite(self.learning_rate) and 0 < self.learning_rate <= 10):
            raise InvalidInput("a learning rate should be above 0 and at most 10")
        if self.total_steps < 1:
            raise InvalidInput("an update needs at least one step")


def learning_rate_at(step: int, config: OptimizerConfig) -> float:
    """The rate of step 0 … total_steps − 1: linear warm-up, then linear decay towards 0."""
    warm = max(1, math.ceil(config.warm_up * config.total_steps))
    if step < warm:
        return config.learning_rate * (step + 1) / warm
    return config.learning_rate * (config.total_steps - step) / (config.total_steps - warm + 1)


class StiefelAdamW:
    """Moments and step count of one update. `step` takes tensors and gradient, gives new tensors."""

    def __init__(self, config: OptimizerConfig) -> None:
        self.config = config
        self.steps = 0
        self._first: dict[str, Array] = {}
        self._second: dict[str, Array] = {}

    def copy(self) -> StiefelAdamW:
        """Steps of the copy leave this one as it is."""
        twin = StiefelAdamW(self.config)
        twin.steps, twin._first, twin._second = self.steps, dict(self._first), dict(self._second)
        return twin

    def step(self, tensors: ShiftTensors, gradient: ShiftTensors) -> ShiftTensors:
        """The tensors after one step; neither argument is changed."""
        norm = gradient.norm()
        scale = min(1.0, self.config.clip / (norm + 1e-6))
        rate = learning_rate_at(self.steps, self.config)
        self.steps += 1
        layers = {}
        for layer, shift in tensors.layers.items():
            of = gradient.layers[layer]
            name = f"layers.{layer}."
            layers[layer] = LayerShift(
                rotation=self._rotate(
                    name + "rotation", shift.rotation, of.rotation * np.float32(scale), rate
                ),
                source=shift.source - rate * self._direction(name + "source", of.source * np.float32(scale)),
                bias=shift.bias - rate * self._direction(name + "bias", of.bias * np.float32(scale)),
            )
        return ShiftTensors(layers)

    def _direction(self, name: str, gradient: Array, *, by_row: bool = False) -> Array:
        """Adam's bias-corrected direction m̂ / (√v̂ + ε), float32; the moments move on."""
        c = self.config
        square = gradient**2
        if by_row:
            square = square.mean(axis=-1, keepdims=True)
        m = c.beta1 * self._first.get(name, np.zeros_like(gradient)) + (1 - c.beta1) * gradient
        v = c.beta2 * self._second.get(name, np.zeros_like(square)) + (1 - c.beta2) * square
        self._first[name], self._second[name] = m.astype(np.float32), v.astype(np.float32)
        m_hat = m / (1 - c.beta1**self.steps)
        v_hat = v / (1 - c.beta2**self.steps)
        return (m_hat / (np.sqrt(v_hat) + c.epsilon)).astype(np.float32)

    def _rotate(self, name: str, rotation: Array, gradient: Array, rate: float) -> Array:
        if name in self._first:
            self._first[name] = _tangent(rotation, self._first[name])
        direction = self._direction(name, _tangent(rotation, gradient), by_row=True)
        return _retract(rotation, -_ROTATION_SCALE * rate * _tangent(rotation, direction))

    # -- bytes ---------------------------------------------------------------------------------

    def to_bytes(self) -> bytes:
        """Configuration, step count and moments, exactly."""
        named = {f"first.{name}": array for name, array in self._first.items()}
        named |= {f"second.{name}": array for name, array in self._second.items()}
        metadata = {"config": json.dumps(asdict(self.config)), "steps": str(self.steps)}
        return safetensors.numpy.save(named or {"none": np.zeros(1, np.float32)}, metadata=metadata)

    @classmethod
    def from_bytes(cls, data: bytes) -> StiefelAdamW:
        """Raises InvalidData."""
        try:
            header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
            values: dict[str, Any] = header["__metadata__"]
            optimizer = cls(OptimizerConfig(**json.loads(values["config"])))
            optimizer.steps = int(values["steps"])
            for name, array in safetensors.numpy.load(data).items():
                moment, _, tensor = name.partition(".")
                if moment in ("first", "second"):
                    (optimizer._first if moment == "first" else optimizer._second)[tensor] = array
        except (safetensors.SafetensorError, ValueError, KeyError, TypeError, InvalidInput) as error:
            raise InvalidData("not the state of an optimizer") from error
        return optimizer


def _tangent(rotation: Array, ambient: Array) -> Array:
    """P_R(A) = A − sym(A Rᵀ) R: the part of A (r, d) that keeps the rows orthonormal, to first order."""
    product = ambient @ rotation.T
    return (ambient - (product + product.T) / 2 @ rotation).astype(np.float32)


def _retract(rotation: Array, change: Array) -> Array:
    """The rows of R + change made orthonormal by QR, in float64 so that errors do not add up."""
    moved = rotation.astype(np.float64) + change
    q, upper = np.linalg.qr(moved.T)
    # QR leaves each column's sign open; the diagonal of a small step's R factor is near +1.
    q *= np.where(np.diag(upper) < 0, -1.0, 1.0)
    return np.ascontiguousarray(q.T, dtype=np.float32)
