"""A shift that lies between two others."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from perfit_shared.shifts import LayerShift, ShiftTensors

__all__ = ["between"]

Wide = npt.NDArray[np.float64]


def between(start: ShiftTensors, end: ShiftTensors, share: float) -> ShiftTensors:
    """The shift `share` of the way from `start` to `end`, of their spec and rank.

    C = W − R and b are interpolated, and R is the rotation nearest to the interpolated one (Rᵀ = UVᵀ of its
    singular value decomposition). Where one was trained from the other, that comes close to
    interpolating their effects Rᵀ(Cx + b), which takes twice the rank (docs/updates-in-small.md).
    """
    return ShiftTensors({layer: _between(of, end.layers[layer], share) for layer, of in start.layers.items()})


def _between(start: LayerShift, end: LayerShift, share: float) -> LayerShift:
    rotation = _nearest(_mix(start.rotation, end.rotation, share))  # (r, d)
    change = _mix(start.source - start.rotation, end.source - end.rotation, share)
    mixed = rotation, rotation + change, _mix(start.bias, end.bias, share)
    return LayerShift(*(array.astype(np.float32) for array in mixed))


def _mix(start: npt.NDArray[Any], end: npt.NDArray[Any], share: float) -> Wide:
    return (1 - share) * start.astype(np.float64) + share * end.astype(np.float64)


def _nearest(matrix: Wide) -> Wide:
    """The matrix with orthonormal rows nearest to this one (r, d)."""
    u, _, v = np.linalg.svd(matrix, full_matrices=False)
    found: Wide = u @ v
    return found
