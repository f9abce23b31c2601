"""Where shifts start: off the identity by a little noise."""

from __future__ import annotations

import numpy as np

from perfit_shared.shifts import LayerShift, ShiftSpec, ShiftTensors

__all__ = ["near_identity"]


def near_identity(spec: ShiftSpec, rank: int, *, seed: int, size: float) -> ShiftTensors:
    """Random orthonormal R; W off R, and b off zero, by normal noise of this size.

    On a state x of d numbers φ(x) − x is then about size·√r·‖x‖ long.
    """
    rng = np.random.default_rng(seed)
    layers = {}
    for layer, shift in ShiftTensors.identity(spec, rank, seed).layers.items():
        noise = rng.standard_normal(shift.source.shape).astype(np.float32)
        bias = rng.standard_normal(rank).astype(np.float32)
        layers[layer] = LayerShift(shift.rotation, shift.source + size * noise, size * bias)
    return ShiftTensors(layers)
