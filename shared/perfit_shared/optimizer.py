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

__all__ = [
    "RATE_GROWTH",
    "ROTATION_SCALE",
    "SCHEDULES",
    "OptimizerConfig",
    "StiefelAdamW",
    "learning_rate_at",
]

SCHEDULES = ("device", "paper")
RATE_GROWTH = 10.0  # of a device's rate from its first step to its last

Array = npt.NDArray[np.float32]
# Torch's Householder coordinates move R about twice as far for one lr; on small random problems 4
# ends below it on average for rates up to 5e-2 (2 ends 2 to 5 % above, 6 diverges at the top).
ROTATION_SCALE = 4.0


@dataclass(frozen=True)
class OptimizerConfig:
    """Raises InvalidInput on a rate or a length that cannot train."""

    learning_rate: float  # peak
    total_steps: int
    warm_up: float = 0.1  # share of the steps; not of "device"
    clip: float = 0.3  # global gradient norm
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    schedule: str = "device"  # of SCHEDULES, see `learning_rate_at`

    def __post_init__(self) -> None:
        if not (math.isfinite(self.learning_rate) and 0 < self.learning_rate <= 10):
            raise InvalidInput("a learning rate should be above 0 and at most 10")
        if self.total_steps < 1:
            raise InvalidInput("an update needs at least one step")
        if self.schedule not in SCHEDULES:
            raise InvalidInput(f'no schedule "{self.schedule[:20]}"; there are {", ".join(SCHEDULES)}')


def learning_rate_at(step: int, config: OptimizerConfig) -> float:
    """The rate of step 0 … total_steps − 1.

    "device" grows tenfold, by an equal factor a step, up to the peak half-way, then decays linearly
    towards 0. How far a shift should move differs by more than that from one history to another: training
    passes through the small moves first, and the examples that judge its epochs say where to stop
    (docs/updates-in-small.md).

    "paper" is the schedule of Hugging Face's trainer: linear warm-up from 0, then linear decay towards 0.
    Only where there is but one step, which would learn nothing, it is the peak.
    """
    if config.schedule == "device":
        top = max(1, config.total_steps // 2)
        if step <= top:
            return config.learning_rate * math.pow(RATE_GROWTH, (step - top) / top)
        return config.learning_rate * (config.total_steps - step) / (config.total_steps - top)
    if config.total_steps == 1:
        return config.learning_rate
    warm = max(1, math.ceil(config.warm_up * config.total_steps))
    if step < warm:
        return config.learning_rate * step / warm
    return config.learning_rate * (config.total_steps - step) / max(1, config.total_steps - warm)


class StiefelAdamW:
    """Moments and step count of one update. `step` takes tensors and gradient, gives new tensors."""

    def __init__(self, config: OptimizerConfig) -> None:
        self.config = config
        self.steps = 0
        self._first: dict[str, Array] = {}
        self._second: dict[str, Array] = {}

    def copy(self) -> StiefelAdamW:
        """Steps of the copy leave this one as it is."""
        copy = StiefelAdamW(self.config)
        copy.steps, copy._first, copy._second = self.steps, dict(self._first), dict(self._second)
        return copy

    def step(self, tensors: ShiftTensors, gradient: ShiftTensors) -> ShiftTensors:
        """The tensors after one step; neither argument is changed."""
        scale = min(1.0, self.config.clip / (gradient.norm() + 1e-6))
        rate = learning_rate_at(self.steps, self.config)
        self.steps += 1
        layers = {}
        for layer, shift in tensors.layers.items():
            of = LayerShift(*(scale * array for array in gradient.layers[layer]))
            name = f"layers.{layer}."
            layers[layer] = LayerShift(
                rotation=self._rotate(name + "rotation", shift.rotation, of.rotation, rate),
                source=self._descend(name + "source", shift.source, of.source, rate),
                bias=self._descend(name + "bias", shift.bias, of.bias, rate),
            )
        return ShiftTensors(layers)

    def _descend(self, name: str, parameter: Array, gradient: Array, rate: float) -> Array:
        change = self._direction(name, gradient, gradient**2, np.empty_like(gradient))
        change *= -rate
        change += parameter
        return change

    def _rotate(self, name: str, rotation: Array, gradient: Array, rate: float) -> Array:
        if name in self._first:
            self._first[name] = _tangent(rotation, self._first[name])
        along = _tangent(rotation, gradient)
        square = np.square(along, out=gradient).mean(axis=-1, keepdims=True)
        direction = self._direction(name, along, square, gradient)
        direction *= -ROTATION_SCALE * rate
        return _retract(rotation, _tangent(rotation, direction))

    def _direction(self, name: str, gradient: Array, square: Array, work: Array) -> Array:
        """Adam's bias-corrected direction m̂ / (√v̂ + ε), written into `work`; the moments move on.

        `gradient` and `square` become the new moments, for copies of this optimizer hold the old ones.
        """
        c = self.config
        scale = work[..., : square.shape[-1]]  # a rotation has one v a row
        m = self._first[name] = _mixed(self._first.get(name), gradient, c.beta1, work)
        v = self._second[name] = _mixed(self._second.get(name), square, c.beta2, scale)
        np.divide(v, 1 - c.beta2**self.steps, out=scale)
        np.sqrt(scale, out=scale)
        scale += c.epsilon
        scale *= 1 - c.beta1**self.steps
        return np.divide(m, scale, out=work)

    # -- bytes ---------------------------------------------------------------------------------

    def to_bytes(self) -> bytes:
        """Configuration, step count and moments, exactly."""
        named = {f"first.{name}": array for name, array in self._first.items()}
        named |= {f"second.{name}": array for name, array in self._second.items()}
        config = asdict(self.config)
        if self.config.schedule == "device":
            del config["schedule"]  # so that readers from before there were two take it
        metadata = {"config": json.dumps(config), "steps": str(self.steps)}
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


def _mixed(moment: Array | None, new: Array, beta: float, work: Array) -> Array:
    """β · moment + (1 − β) · new, written over `new`; `work` has their shape."""
    new *= 1 - beta
    if moment is not None:
        new += np.multiply(moment, beta, out=work)
    return new


def _tangent(rotation: Array, ambient: Array) -> Array:
    """P_R(A) = A − sym(A Rᵀ) R: the part of A (r, d) that keeps the rows orthonormal, to first order."""
    product = ambient @ rotation.T
    part = (product + product.T) @ rotation
    part *= -0.5
    part += ambient
    return part


def _retract(rotation: Array, change: Array) -> Array:
    """The rows of M = R + change made orthonormal by QR, in float64 so that errors do not add up.

    With MMᵀ = LLᵀ (Cholesky) Mᵀ = (L⁻¹M)ᵀ Lᵀ is that decomposition, signs and all, in an eighth of
    Householder's time. It squares M's condition, which is next to 1: a tangent step only lengthens rows.
    """
    moved = rotation.astype(np.float64)
    moved += change
    lower = np.linalg.cholesky(moved @ moved.T)  # (r, r)
    rows = np.linalg.inv(lower) @ moved
    return rows.astype(np.float32)
