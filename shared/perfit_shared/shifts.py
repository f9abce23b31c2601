"""Shifts φ(x) = x + Rᵀ(Wx + b − Rx) as numpy tensors, and their form on disk and on the wire.

R *rotation* (r, d) with orthonormal rows, W *source* (r, d), b *bias* (r); one triple a layer
(PerFit, eq. 3, after LoReFT). Nothing here computes φ: the cloud does.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.numpy

from perfit_shared.errors import InvalidInput, InvalidTensors
from perfit_shared.positions import Positions

__all__ = ["LayerShift", "ShiftSpec", "ShiftTensors", "read_metadata"]

Array = npt.NDArray[np.float32]

# Largest Frobenius norm of one tensor. Trained shifts stay under 100; beyond this lies abuse, which
# float32 and bfloat16 survive for 16 layers in a row before a hidden state could overflow.
NORM_CAP = 200.0
# ‖RRᵀ − I‖ (Frobenius) that rounding to the dtype explains at r = 32, d = 4096 (fp16: 1.5e-4
# measured), with room. Rounding averages out over d, so it is √(4096 / d) of that at other widths.
_ORTHONORMAL = {"float32": 5e-6, "float16": 2.5e-4}
_FORMAT = "perfit-shift-1"
_HEADER_CAP = 64 * 1024  # bytes: names of a few dozen tensors need under 10 KB


@dataclass(frozen=True)
class ShiftSpec:
    """What both sides must agree on. Raises InvalidInput when built with nonsense."""

    layers: tuple[int, ...]  # intervened blocks, counted from 0, ascending
    positions: str  # "f7+l7"
    collective_rank: int  # r of φ₁
    personal_rank: int  # r of φ₂
    hidden_size: int  # d

    def __post_init__(self) -> None:
        layers = tuple(self.layers)
        if not layers or list(layers) != sorted(set(layers)) or layers[0] < 0:
            raise InvalidInput("layers should be distinct block numbers, ascending")
        for rank in (self.collective_rank, self.personal_rank):
            if not 0 < rank <= self.hidden_size:
                raise InvalidInput("ranks should be at least 1 and at most the hidden size")
        object.__setattr__(self, "layers", layers)
        object.__setattr__(self, "positions", str(Positions.parse(self.positions)))

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"layers": list(self.layers)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ShiftSpec:
        try:
            return cls(**{**data, "layers": tuple(data["layers"])})
        except (TypeError, KeyError) as error:
            raise InvalidInput("a shift spec needs layers, positions, ranks and hidden_size") from error

    def personal_parameters(self) -> int:
        """How many numbers a personal shift has."""
        return len(self.layers) * self.personal_rank * (2 * self.hidden_size + 1)


class LayerShift(NamedTuple):
    """One layer's φ: rotation (r, d), source (r, d), bias (r,), float32."""

    rotation: Array
    source: Array
    bias: Array


@dataclass(frozen=True)
class ShiftTensors:
    """The tensors of one shift, by layer. Arrays are float32 and not to be written to."""

    layers: Mapping[int, LayerShift]

    # -- making --------------------------------------------------------------------------------

    @classmethod
    def identity(cls, spec: ShiftSpec, rank: int, seed: int = 0) -> ShiftTensors:
        """Random orthonormal R with W = R and b = 0, so that φ(x) = x exactly."""
        rng = np.random.default_rng(seed)
        layers = {}
        for layer in spec.layers:
            q = np.linalg.qr(rng.standard_normal((spec.hidden_size, rank)))[0]
            rotation = np.ascontiguousarray(q.T, dtype=np.float32)
            layers[layer] = LayerShift(rotation, rotation.copy(), np.zeros(rank, np.float32))
        return cls(layers)

    @classmethod
    def from_named(cls, named: Mapping[str, npt.NDArray[Any]]) -> ShiftTensors:
        """From "layers.{l}.{rotation|source|bias}" → array. Raises InvalidTensors on other names."""
        grouped: dict[int, dict[str, Array]] = {}
        for name, array in named.items():
            parts = name.split(".")
            if (
                len(parts) != 3
                or parts[0] != "layers"
                or not parts[1].isascii()
                or not parts[1].isdigit()
                or len(parts[1]) > 4
                or parts[2] not in LayerShift._fields
            ):
                raise InvalidTensors("a tensor has a name that no shift has")
            grouped.setdefault(int(parts[1]), {})[parts[2]] = np.asarray(array, dtype=np.float32)
        for layer, tensors in grouped.items():
            if len(tensors) != 3:
                raise InvalidTensors(f"layer {layer} lacks its rotation, source or bias")
        return cls({layer: LayerShift(**grouped[layer]) for layer in sorted(grouped)})

    # -- looking -------------------------------------------------------------------------------

    def named(self) -> Iterator[tuple[str, Array]]:
        """("layers.14.rotation", array) for every tensor, in a fixed order."""
        for layer in sorted(self.layers):
            for field, array in zip(LayerShift._fields, self.layers[layer], strict=True):
                yield f"layers.{layer}.{field}", array

    def norm(self) -> float:
        """Frobenius norm over all tensors."""
        return math.sqrt(sum(float(np.vdot(a, a)) for _, a in self.named()))

    def digest(self) -> str:
        """sha-256 over names, shapes and values, hex."""
        h = hashlib.sha256()
        for name, array in self.named():
            h.update(f"{name}{array.shape}".encode())
            h.update(np.ascontiguousarray(array).tobytes())
        return h.hexdigest()

    # -- checking ------------------------------------------------------------------------------

    def check(self, spec: ShiftSpec, rank: int, *, gradient: bool = False, dtype: str = "float32") -> None:
        """Raise InvalidTensors unless names, shapes and values are those of a shift of `rank`.

        Values: finite, each tensor within NORM_CAP, ‖RRᵀ − I‖ within what `dtype` explains.
        A gradient only has to be finite.
        """
        if set(self.layers) != set(spec.layers):
            raise InvalidTensors("the layers of the tensors are not those of the artefact's spec")
        d = spec.hidden_size
        for layer, shift in self.layers.items():
            shapes = ((rank, d), (rank, d), (rank,))
            for field, array, shape in zip(LayerShift._fields, shift, shapes, strict=True):
                if array.shape != shape:
                    raise InvalidTensors(f"layers.{layer}.{field} should have shape {shape}")
                if not np.isfinite(array).all():
                    raise InvalidTensors(f"layers.{layer}.{field} holds NaN or infinity")
                if not gradient and float(np.linalg.norm(array.astype(np.float64))) > NORM_CAP:
                    raise InvalidTensors(f"layers.{layer}.{field} is too large to be a shift")
            if not gradient:
                r = shift.rotation.astype(np.float64)
                error = float(np.linalg.norm(r @ r.T - np.eye(rank)))
                if error > _ORTHONORMAL[dtype] * math.sqrt(4096 / d) * max(1.0, rank / 32):
                    raise InvalidTensors(f"the rows of layers.{layer}.rotation are not orthonormal")

    # -- bytes ---------------------------------------------------------------------------------

    def to_bytes(self, *, dtype: str = "float32", metadata: Mapping[str, str] | None = None) -> bytes:
        """safetensors bytes in "float32" or "float16"."""
        named = {name: np.ascontiguousarray(a.astype(dtype)) for name, a in self.named()}
        header = None if metadata is None else {"format": _FORMAT, **metadata}
        return safetensors.numpy.save(named, metadata=header)

    @classmethod
    def from_bytes(cls, data: bytes, spec: ShiftSpec, rank: int, *, gradient: bool = False) -> ShiftTensors:
        """Decode and check. Raises InvalidTensors; looks at the size before anything else."""
        elements = len(spec.layers) * rank * (2 * spec.hidden_size + 1)
        if len(data) > 4 * elements + _HEADER_CAP:
            raise InvalidTensors("more bytes than a shift of this spec has")
        try:
            named = safetensors.numpy.load(data)
        except (safetensors.SafetensorError, KeyError, ValueError, TypeError, OverflowError) as error:
            raise InvalidTensors("not a safetensors payload") from error
        dtypes = {array.dtype.name for array in named.values()}
        if len(dtypes) != 1 or not dtypes <= _ORTHONORMAL.keys():
            raise InvalidTensors("tensors should all be float32 or all float16")
        tensors = cls.from_named(named)
        tensors.check(spec, rank, gradient=gradient, dtype=dtypes.pop())
        return tensors


def read_metadata(data: bytes) -> dict[str, str]:
    """The metadata of an exported shift file. Raises InvalidTensors if it is none."""
    try:
        size = int.from_bytes(data[:8], "little")
        if not 0 < size <= _HEADER_CAP:
            raise ValueError
        metadata = json.loads(data[8 : 8 + size]).get("__metadata__") or {}
        if metadata.get("format") != _FORMAT:
            raise ValueError
    except (ValueError, AttributeError) as error:
        raise InvalidTensors("not a shift file; `perfit export --shift FILE` writes one") from error
    return {str(k): str(v) for k, v in metadata.items()}
