"""Specs, tensors and their bytes: what is refused, and that the rest comes back bit for bit."""

from __future__ import annotations

import json
import struct

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.conftest import random_shift

from perfit_shared.errors import InvalidInput, InvalidTensors, PerfitError
from perfit_shared.shifts import LayerShift, ShiftSpec, ShiftTensors, read_metadata

SPEC = ShiftSpec((1, 3), "f7+l7", 8, 4, 16)


def broken(field: str, change: object) -> dict[str, np.ndarray]:
    named = {name: array.copy() for name, array in random_shift(SPEC, 4, 0).named()}
    named[f"layers.1.{field}"] = change(named[f"layers.1.{field}"])  # type: ignore[operator]
    return named


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_bytes_round_trip(dtype: str) -> None:
    shift = random_shift(SPEC, 4, 1)
    back = ShiftTensors.from_bytes(shift.to_bytes(dtype=dtype, metadata={"artefact": "a"}), SPEC, 4)
    for (name, want), (same, got) in zip(shift.named(), back.named(), strict=True):
        assert name == same
        np.testing.assert_array_equal(got, want.astype(dtype).astype(np.float32))
    assert (back.digest() == shift.digest()) is (dtype == "float32")


@pytest.mark.parametrize(
    ("field", "change", "says"),
    [
        ("rotation", lambda a: a[:, :-1], "shape"),
        ("bias", lambda a: np.full_like(a, np.nan), "NaN"),
        ("source", lambda a: np.full_like(a, np.inf), "NaN or infinity"),
        ("source", lambda a: a * 1e6, "too large"),
        ("rotation", lambda a: a * 1.01, "orthonormal"),
        ("rotation", lambda a: np.repeat(a[:1], 4, 0), "orthonormal"),
        ("bias", lambda a: a.astype(np.float64), "float32"),
        ("bias", lambda a: a.astype(np.float16), "should all be float32"),
    ],
)
def test_hostile_values_are_refused(field: str, change: object, says: str) -> None:
    with pytest.raises(InvalidTensors, match=says):
        ShiftTensors.from_bytes(safetensors.numpy.save(broken(field, change)), SPEC, 4)


@pytest.mark.parametrize(
    "rename",
    ["layers.1.rotations", "layers.-1.bias", "layers.01x.bias", "bias", "layers.9.bias", "layers.²1.bias"],
)
def test_hostile_names_are_refused(rename: str) -> None:
    named = broken("bias", lambda a: a)
    named[rename] = named.pop("layers.1.bias")
    with pytest.raises(InvalidTensors):
        ShiftTensors.from_bytes(safetensors.numpy.save(named), SPEC, 4)


def test_a_missing_or_extra_layer_is_refused() -> None:
    shift = random_shift(SPEC, 4, 0)
    one = ShiftTensors({1: shift.layers[1]})
    with pytest.raises(InvalidTensors, match="layers"):
        ShiftTensors.from_bytes(one.to_bytes(), SPEC, 4)
    with pytest.raises(InvalidTensors, match="more bytes"):
        ShiftTensors.from_bytes(b"\0" * 200_000, SPEC, 4)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=400), st.booleans())
def test_garbage_is_always_invalid_tensors(data: bytes, framed: bool) -> None:
    if framed:
        data = struct.pack("<Q", len(data)) + data
    with pytest.raises(InvalidTensors):
        ShiftTensors.from_bytes(data, SPEC, 4)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_a_flipped_byte_never_raises_anything_else(data: st.DataObject) -> None:
    raw = bytearray(random_shift(SPEC, 4, 2).to_bytes())
    at = data.draw(st.integers(0, len(raw) - 1))
    raw[at] ^= data.draw(st.integers(1, 255))
    try:
        ShiftTensors.from_bytes(bytes(raw), SPEC, 4)
    except PerfitError as error:
        assert isinstance(error, InvalidTensors)


def test_identity_is_one() -> None:
    shift = ShiftTensors.identity(SPEC, 4)
    shift.check(SPEC, 4)
    for layer in shift.layers.values():
        np.testing.assert_array_equal(layer.rotation, layer.source)


def test_a_spec_of_nonsense_is_refused() -> None:
    for wrong in ({"layers": (3, 1)}, {"layers": ()}, {"layers": (-1,)}, {"personal_rank": 0},
                  {"collective_rank": 17}, {"positions": "f7l7"}):  # fmt: skip
        with pytest.raises(InvalidInput):
            ShiftSpec(**{**SPEC.to_json(), "layers": SPEC.layers, **wrong})
    assert ShiftSpec.from_json(json.loads(json.dumps(SPEC.to_json()))) == SPEC
    assert SPEC.personal_parameters() == 2 * 4 * 33
    with pytest.raises(InvalidInput):
        ShiftSpec.from_json({"layers": [1], "rank": 3})


def test_metadata_of_an_exported_file() -> None:
    shift = random_shift(SPEC, 4, 0)
    assert read_metadata(shift.to_bytes(metadata={"artefact": "x"}))["artefact"] == "x"
    for other in (shift.to_bytes(), b"", b"\xff" * 40, b"PK\x03\x04" + b"\0" * 60):
        with pytest.raises(InvalidTensors, match="not a shift file"):
            read_metadata(other)


def test_layer_shift_fields_are_the_wire_names() -> None:
    assert LayerShift._fields == ("rotation", "source", "bias")
