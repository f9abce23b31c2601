"""Shifts φ(x) = x + Rᵀ(Wx + b − Rx) as numpy tensors, and their forms on disk and on the wire.

R *rotation* (r, d) with orthonormal rows, W *source* (r, d), b *bias* (r); one triple a layer
(PerFit, eq. 2, after LoReFT). Nothing here computes φ: the cloud does.

Disks hold float32. On the wire float16 and int8 also go: R, W − R (*change*) and b, rounded. φ needs
orthonormal rows, which rounding spoils: the receiver takes the rotation nearest to what came, and W
from it and the change.
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
from perfit_shared.rotations import nearest_rotation, off_orthonormal

__all__ = [
    "LayerShift",
    "ShiftSpec",
    "ShiftTensors",
    "gradient_from_bytes",
    "gradient_to_bytes",
    "read_metadata",
    "wire_dtype",
]

Array = npt.NDArray[np.float32]
Parts = dict[str, npt.NDArray[Any]]  # of one layer, by the end of their names

# Largest Frobenius norm of one tensor. Trained shifts stay under 100; beyond this lies abuse, which
# float32 and bfloat16 survive for 16 layers in a row before a hidden state could overflow.
NORM_CAP = 200.0
# ‖RRᵀ − I‖ (Frobenius) that float32 explains at r = 32, d = 4096, with room. Rounding averages out over
# d, so it is √(4096 / d) of that at other widths.
_ORTHONORMAL = 5e-6
# Parts of a layer by form: dtype and shape, where r and d stand for the rank and the hidden size.
_SHIFT_FORMS = {
    "float32": {"rotation": ("float32", "rd"), "source": ("float32", "rd"), "bias": ("float32", "r")},
    "float16": {"rotation": ("float16", "rd"), "change": ("float16", "rd"), "bias": ("float16", "r")},
    "int8": {
        "rotation": ("int8", "rd"),
        "rotation.scale": ("float32", "r"),
        "change": ("int8", "rd"),
        "change.scale": ("float32", "r"),
        "bias": ("float32", "r"),
    },
}
_GRADIENT_FORMS = {
    "float32": _SHIFT_FORMS["float32"],
    "float16": {
        "rotation": ("float16", "rd"),
        "rotation.scale": ("float32", "1"),
        "source": ("float16", "rd"),
        "source.scale": ("float32", "1"),
        "bias": ("float16", "r"),
        "bias.scale": ("float32", "1"),
    },
}
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
        if any(
            type(n) is not int for n in (*layers, self.collective_rank, self.personal_rank, self.hidden_size)
        ):
            raise InvalidInput("layers, ranks and hidden size should be whole numbers")
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

    def parameters(self, rank: int) -> int:
        """How many numbers a shift of this rank has."""
        return len(self.layers) * rank * (2 * self.hidden_size + 1)

    def personal_parameters(self) -> int:
        """How many numbers a personal shift has."""
        return self.parameters(self.personal_rank)


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

    def check(self, spec: ShiftSpec, rank: int) -> None:
        """Raise InvalidTensors unless names, shapes and values are those of a shift of `rank`.

        Values: finite, each tensor within NORM_CAP, ‖RRᵀ − I‖ within what float32 explains.
        """
        self.check_layout(spec, rank)
        explained = _ORTHONORMAL * math.sqrt(4096 / spec.hidden_size) * max(1.0, rank / 32)
        for layer, shift in self.layers.items():
            for field, array in zip(LayerShift._fields, shift, strict=True):
                if float(np.linalg.norm(array.astype(np.float64))) > NORM_CAP:
                    raise InvalidTensors(f"layers.{layer}.{field} is too large to be a shift")
            if off_orthonormal(shift.rotation.astype(np.float64))[1] > explained:
                raise InvalidTensors(f"the rows of layers.{layer}.rotation are not orthonormal")

    def check_layout(self, spec: ShiftSpec, rank: int) -> None:
        """The part of `check` that costs little: names, dtypes, shapes, and that all numbers are finite."""
        _check_layout(dict(self.named()), _SHIFT_FORMS["float32"], spec, rank)

    # -- bytes ---------------------------------------------------------------------------------

    def to_bytes(self, *, dtype: str = "float32", metadata: Mapping[str, str] | None = None) -> bytes:
        """safetensors bytes in the form "float32", "float16" or "int8"; InvalidInput on any other."""
        _check_form(dtype, _SHIFT_FORMS)
        layers = {layer: _rounded(shift, dtype) for layer, shift in self.layers.items()}
        return _save(layers, None if metadata is None else {"format": _FORMAT, **metadata})

    @classmethod
    def from_bytes(cls, data: bytes, spec: ShiftSpec, rank: int) -> ShiftTensors:
        """Decode any form and check. Raises InvalidTensors; looks at the size before anything else."""
        form, layers = _load(data, _SHIFT_FORMS, spec, rank)
        tensors = cls({layer: _restored(parts, form, layer) for layer, parts in layers.items()})
        tensors.check(spec, rank)
        return tensors


def wire_dtype(data: bytes) -> str:
    """The form of a shift's bytes: "float32", "float16" or "int8". Raises InvalidTensors."""
    tensors = [of for name, of in _header(data).items() if name != "__metadata__" and isinstance(of, dict)]
    dtypes = [tensor.get("dtype") for tensor in tensors]
    return "int8" if "I8" in dtypes else "float16" if "F16" in dtypes else "float32"


def gradient_to_bytes(gradient: ShiftTensors, dtype: str) -> bytes:
    """safetensors bytes of d loss / d tensor in "float32" or "float16".

    Raises InvalidTensors when it holds NaN or infinity, InvalidInput on another form.
    """
    _check_form(dtype, _GRADIENT_FORMS)
    for name, array in gradient.named():
        if not np.isfinite(array).all():
            raise InvalidTensors(f"the gradient of {name} holds NaN or infinity")
    return _save({layer: _scaled(shift, dtype) for layer, shift in gradient.layers.items()})


def gradient_from_bytes(data: bytes, spec: ShiftSpec, rank: int) -> ShiftTensors:
    """Decode either form. Raises InvalidTensors unless it has the spec's names and shapes and is finite."""
    form, layers = _load(data, _GRADIENT_FORMS, spec, rank)
    if form == "float16":
        with np.errstate(over="ignore"):  # the check below tells
            layers = {
                layer: {f: parts[f].astype(np.float32) * parts[f"{f}.scale"] for f in LayerShift._fields}
                for layer, parts in layers.items()
            }
    gradient = ShiftTensors({layer: LayerShift(**parts) for layer, parts in layers.items()})
    _check_layout(dict(gradient.named()), _GRADIENT_FORMS["float32"], spec, rank)
    return gradient


# -- forms -------------------------------------------------------------------------------------------


def _check_form(form: str, forms: Mapping[str, object]) -> None:
    if form not in forms:
        raise InvalidInput(f"a form of tensors should be {', '.join(forms)}")


def _rounded(shift: LayerShift, form: str) -> Parts:
    """The parts of a layer in a form of _SHIFT_FORMS."""
    rotation, source, bias = shift
    if form == "float32":
        return shift._asdict()
    change = source - rotation
    if form == "float16":
        parts = {"rotation": rotation, "change": change, "bias": bias}
        return {part: array.astype(np.float16) for part, array in parts.items()}
    (rotation8, rotation_scale), (change8, change_scale) = _in_int8(rotation), _in_int8(change)
    return {
        "rotation": rotation8,
        "rotation.scale": rotation_scale,
        "change": change8,
        "change.scale": change_scale,
        "bias": bias,
    }


def _restored(parts: Parts, form: str, layer: int) -> LayerShift:
    """The way back, with the rotation nearest to the rounded one.

    Raises InvalidTensors when that is further from orthonormal than rounding explains.
    """
    if form == "float32":
        return LayerShift(**parts)
    rotation = parts["rotation"].astype(np.float64)  # (r, d)
    change = parts["change"].astype(np.float32)
    if form == "float16":
        step = np.abs(rotation) * 2.0**-10 + 2.0**-24  # at most, between one number and the next
    else:
        for part in ("rotation.scale", "change.scale"):
            if not ((parts[part] >= 0) & (parts[part] <= NORM_CAP)).all():
                raise InvalidTensors(f"layers.{layer}.{part} is no scale")
        step = parts["rotation.scale"].astype(np.float64)[:, None]
        rotation *= step
        change *= parts["change.scale"][:, None]
    nearest = nearest_rotation(rotation, step)
    if nearest is None:
        raise InvalidTensors(f"the rows of layers.{layer}.rotation are not orthonormal")
    return LayerShift(nearest, nearest + change, parts["bias"].astype(np.float32))


def _in_int8(array: Array) -> tuple[npt.NDArray[np.int8], Array]:
    """(r, d) as whole numbers from −127 to 127 times a scale (r) for each row."""
    scale = np.abs(array).max(axis=1) / np.float32(127)
    safe = np.where(scale > 0, scale, 1)[:, None]
    return np.rint(array / safe).astype(np.int8), scale


def _scaled(gradient: LayerShift, form: str) -> Parts:
    """The parts of a layer's gradient in a form of _GRADIENT_FORMS."""
    if form == "float32":
        return gradient._asdict()
    parts: Parts = {}
    for field, array in zip(LayerShift._fields, gradient, strict=True):
        scale = np.abs(array).max()
        parts[field] = (array / (scale or np.float32(1))).astype(np.float16)
        parts[f"{field}.scale"] = scale.reshape(1)
    return parts


# -- safetensors -------------------------------------------------------------------------------------


def _save(layers: Mapping[int, Parts], metadata: dict[str, str] | None = None) -> bytes:
    named = {
        f"layers.{layer}.{part}": np.ascontiguousarray(array)
        for layer in sorted(layers)
        for part, array in layers[layer].items()
    }
    return safetensors.numpy.save(named, metadata=metadata)


def _load(
    data: bytes, forms: Mapping[str, Mapping[str, tuple[str, str]]], spec: ShiftSpec, rank: int
) -> tuple[str, dict[int, Parts]]:
    """The form, and the parts by layer. Raises InvalidTensors unless all is as the form wants it."""
    if len(data) > 4 * spec.parameters(rank) + _HEADER_CAP:
        raise InvalidTensors("more bytes than a shift of this spec has")
    try:
        named = safetensors.numpy.load(data)
    except (safetensors.SafetensorError, KeyError, ValueError, TypeError, OverflowError) as error:
        raise InvalidTensors("not a safetensors payload") from error
    dtypes = {array.dtype.name for array in named.values()}
    form = next(
        (name for name, parts in forms.items() if {dtype for dtype, _ in parts.values()} == dtypes), ""
    )
    if not form:
        raise InvalidTensors(f"tensors should all be in one form: {', '.join(forms)}")
    _check_layout(named, forms[form], spec, rank)
    layers = {layer: {part: named[f"layers.{layer}.{part}"] for part in forms[form]} for layer in spec.layers}
    return form, layers


def _check_layout(
    named: Mapping[str, npt.NDArray[Any]], parts: Mapping[str, tuple[str, str]], spec: ShiftSpec, rank: int
) -> None:
    """Raise InvalidTensors unless names, dtypes and shapes are those of `parts`, and all is finite."""
    sizes = {"r": rank, "d": spec.hidden_size, "1": 1}
    wanted = {f"layers.{layer}.{part}": of for layer in spec.layers for part, of in parts.items()}
    if named.keys() != wanted.keys():
        raise InvalidTensors("the tensors are not those of the layers of the artefact's spec")
    for name, (dtype, dims) in wanted.items():
        array, shape = named[name], tuple(sizes[dim] for dim in dims)
        if array.dtype.name != dtype:
            raise InvalidTensors(f"{name} should be {dtype}")
        if array.shape != shape:
            raise InvalidTensors(f"{name} should have shape {shape}")
        if not np.isfinite(array).all():
            raise InvalidTensors(f"{name} holds NaN or infinity")


def _header(data: bytes) -> dict[str, Any]:
    """The header of safetensors bytes. Raises InvalidTensors when there is none."""
    try:
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size]) if 0 < size <= _HEADER_CAP else None
    except (ValueError, RecursionError):
        header = None
    if not isinstance(header, dict):
        raise InvalidTensors("not a safetensors payload")
    return header


def read_metadata(data: bytes) -> dict[str, str]:
    """The metadata of an exported shift file. Raises InvalidTensors if it is none."""
    try:
        metadata = _header(data).get("__metadata__")
    except InvalidTensors:
        metadata = None
    if not isinstance(metadata, dict) or metadata.get("format") != _FORMAT:
        raise InvalidTensors("not a shift file; `perfit export --shift FILE` writes one")
    return {str(k): str(v) for k, v in metadata.items()}
