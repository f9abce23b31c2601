"""Matrices with orthonormal rows: how far one is from them, and the nearest one. No copies stay behind."""

from __future__ import annotations

import math
import threading

import numpy as np
import numpy.typing as npt

__all__ = ["nearest_rotation", "off_orthonormal"]

Wide = npt.NDArray[np.float64]

# No honest rotation is further off, in any form; within it the nearest rotation is well conditioned.
_FAR_FROM_ORTHONORMAL = 0.5
_BLAS = threading.Lock()  # held while tensors are multiplied


def nearest_rotation(rounded: Wide, step: Wide) -> npt.NDArray[np.float32] | None:
    """The matrix with orthonormal rows nearest to `rounded` (r, d), which went in steps of `step`.

    Rounding moved each entry by up to half a step, evenly: Δ has variance step² / 12. That makes
    RΔᵀ + ΔRᵀ + ΔΔᵀ of RRᵀ − I, of which the first two have a known spread, and the last a known mean.
    None when RRᵀ − I is larger than that.
    """
    gram, off = off_orthonormal(rounded)
    weights, steps = rounded**2, np.broadcast_to(step**2, rounded.shape)
    spread = math.sqrt((float(weights.sum(0) @ steps.sum(0)) + float(np.vdot(weights, steps))) / 6)
    if off > min(6 * spread + float(steps.sum()) / 12, _FAR_FROM_ORTHONORMAL):
        return None
    with _BLAS:
        values, vectors = np.linalg.eigh(gram)
        nearest: npt.NDArray[np.float32] = (((vectors / np.sqrt(values)) @ vectors.T) @ rounded).astype(
            np.float32
        )
        _overwrite_blas(gram, rounded)
    return nearest


def off_orthonormal(rotation: Wide) -> tuple[Wide, float]:
    """RRᵀ (r, r), and the Frobenius norm of what it differs from I."""
    with _BLAS:
        gram = rotation @ rotation.T
        _overwrite_blas(rotation, rotation.T)
    return gram, float(np.linalg.norm(gram - np.eye(len(gram))))


def _overwrite_blas(left: Wide, right: Wide) -> None:
    """Overwrite the copies of both that the product left @ right has left behind.

    BLAS copies what it multiplies to buffers that it never frees: the same product of zeros goes through the
    same ones, as long as one thread after the other multiplies (_BLAS).
    """
    zeros = np.zeros_like(left)
    zeros @ (zeros.T if np.may_share_memory(left, right) else np.zeros_like(right))
