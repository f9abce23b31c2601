"""How far a personal shift is from the seed, layer by layer.

Many tensors stand for one and the same φ: rotating its r-dimensional space changes R, W and b, and not what
they do. So the maps are compared, x ↦ Rᵀ((W − R)x + b), and not the tensors: the Frobenius norm of the
difference of [Rᵀ(W − R) | Rᵀb], which is d × (d + 1), from r × r products alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from perfit_device.cloud.codec import Artefact
    from perfit_device.vault.store import Vault
    from perfit_shared.shifts import LayerShift, ShiftTensors

__all__ = ["LayerDistance", "distances", "read_seed", "write_seed"]

_SEED = "seed"  # kind of the row, one a shift


@dataclass(frozen=True)
class LayerDistance:
    layer: int
    moved: float  # from the seed
    seed: float  # how much the seed itself changes


def distances(shift: ShiftTensors, seed: ShiftTensors) -> tuple[LayerDistance, ...]:
    """Of the layers that both have in one shape."""
    found = []
    for layer, mine in sorted(shift.layers.items()):
        start = seed.layers.get(layer)
        if start is not None and start.rotation.shape == mine.rotation.shape:
            found.append(LayerDistance(layer, _distance(mine, start), float(np.linalg.norm(_change(start)))))
    return tuple(found)


def _distance(one: LayerShift, other: LayerShift) -> float:
    """‖RᵀA − SᵀB‖² = ‖A‖² + ‖B‖² − 2⟨RSᵀ, ABᵀ⟩, since the rows of R and S are orthonormal."""
    a, b = _change(one), _change(other)
    across = one.rotation.astype(np.float64) @ other.rotation.astype(np.float64).T
    square = np.sum(a * a) + np.sum(b * b) - 2 * np.sum(across * (a @ b.T))
    return float(np.sqrt(max(0.0, square)))


def _change(shift: LayerShift) -> npt.NDArray[np.float64]:
    """[W − R | b] (r, d + 1)."""
    change = shift.source.astype(np.float64) - shift.rotation
    return np.concatenate([change, shift.bias.astype(np.float64)[:, None]], axis=1)


def write_seed(vault: Vault, row: str, artefact: Artefact, seed: ShiftTensors) -> None:
    """Keep where a shift began; `row` is the shift's."""
    vault.put(_SEED, row, seed.to_bytes(metadata={"version": artefact.version}))


def read_seed(vault: Vault, row: str, version: str) -> ShiftTensors | None:
    """The seed of this version of the artefact, None where it is not kept."""
    import safetensors
    import safetensors.numpy

    from perfit_shared.errors import InvalidTensors
    from perfit_shared.shifts import ShiftTensors, read_metadata

    data = vault.get(_SEED, row)
    try:
        if data is None or read_metadata(data).get("version") != version:
            return None
        return ShiftTensors.from_named(safetensors.numpy.load(data))
    except (InvalidTensors, safetensors.SafetensorError):
        return None
