"""Specs, tensors and their bytes: what is refused, and what each form makes of the rest."""

from __future__ import annotations

import json
import struct

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.models import random_shift

from perfit_shared.errors import InvalidInput, InvalidTensors, PerfitError
from perfit_shared.shifts import (
    LayerShift,
    ShiftSpec,
    ShiftTensors,
    gradient_from_bytes,
    gradient_to_bytes,
    read_metadata,
    wire_dtype,
)

SPEC = ShiftSpec((1, 3), "f7+l7", 8, 4, 16)
FORMS = ("float32", "float16", "int8")
ROUNDED = FORMS[1:]


def broken(field: str, change: object) -> dict[str, np.ndarray]:
    named = {name: array.copy() for name, array in random_shift(SPEC, 4, 0).named()}
    named[f"layers.1.{field}"] = change(named[f"layers.1.{field}"])  # type: ignore[operator]
    return named


def test_float32_comes_back_bit_for_bit() -> None:
    shift = random_shift(SPEC, 4, 1)
    assert ShiftTensors.from_bytes(shift.to_bytes(metadata={"a": "b"}), SPEC, 4).digest() == shift.digest()


def spiky(rank: int, width: int, seed: int, heavy: float) -> np.ndarray:
    """Orthonormal rows (r, d), a few columns of which are `heavy` times as large as the others."""
    columns = np.random.default_rng(seed).standard_normal((width, rank))
    columns[: 2 * rank] *= heavy
    return np.ascontiguousarray(np.linalg.qr(columns)[0].T, dtype=np.float32)


@pytest.mark.parametrize("dtype", ROUNDED)
@pytest.mark.parametrize(("rank", "width"), [(1, 32), (4, 16), (8, 64), (16, 16), (4, 4096), (32, 4096)])
@pytest.mark.parametrize("heavy", [1, 30])
def test_rounded_forms_come_back_close_and_orthonormal(
    dtype: str, rank: int, width: int, heavy: float
) -> None:
    """Honest tensors always pass: also those whose rotation leans on a few of the model's channels."""
    spec = ShiftSpec((2,), "l7", rank, rank, width)
    for seed in range(3 if width > 1000 else 40):
        rng = np.random.default_rng(seed)
        rotation = spiky(rank, width, seed, heavy)
        change = rng.standard_normal((rank, width)).astype(np.float32) * np.float32(
            10.0 ** rng.integers(-3, 1)
        )
        bias = rng.standard_normal(rank).astype(np.float32)
        sent = LayerShift(rotation, rotation + change, bias)
        data = ShiftTensors({2: sent}).to_bytes(dtype=dtype)
        assert wire_dtype(data) == dtype
        got = ShiftTensors.from_bytes(data, spec, rank).layers[2]  # checks that R is orthonormal in float32
        part = 2.0**-11 if dtype == "float16" else 0.5 / 127  # of the largest number of a row: half a step
        off = np.abs(got.source - got.rotation - change)
        assert (off <= 1.01 * part * np.abs(change).max(1, keepdims=True) + 1e-6).all()
        # Half a step of each number at most, and making it orthonormal moves it as far again at most.
        furthest = 2 * part * np.sqrt(width) * np.linalg.norm(np.abs(rotation).max(1))
        assert 0 < np.linalg.norm(got.rotation - rotation) <= furthest
        np.testing.assert_allclose(got.bias, bias, rtol=2.0**-11 if dtype == "float16" else 0)


@pytest.mark.parametrize("dtype", ROUNDED)
def test_the_restored_rotation_is_the_nearest(dtype: str) -> None:
    """By the polar factor U Vᵀ of the rounded numbers U S Vᵀ."""
    spec = ShiftSpec((2,), "l7", 4, 4, 64)
    data = random_shift(spec, 4, 5).to_bytes(dtype=dtype)
    named = safetensors.numpy.load(data)
    rounded = named["layers.2.rotation"].astype(np.float64)
    if dtype == "int8":
        rounded *= named["layers.2.rotation.scale"][:, None]
    u, _, v = np.linalg.svd(rounded, full_matrices=False)
    got = ShiftTensors.from_bytes(data, spec, 4).layers[2].rotation
    np.testing.assert_allclose(got, u @ v, atol=1e-7)
    assert np.abs(got - rounded).max() > 1e-5, "or there was nothing to restore"


@pytest.mark.parametrize("dtype", FORMS)
def test_the_identity_stays_one_in_every_form(dtype: str) -> None:
    """W = R to the bit, so that φ(x) = x to the bit."""
    for seed in range(20):
        data = ShiftTensors.identity(SPEC, 4, seed).to_bytes(dtype=dtype)
        for shift in ShiftTensors.from_bytes(data, SPEC, 4).layers.values():
            np.testing.assert_array_equal(shift.source - shift.rotation, 0)
            np.testing.assert_array_equal(shift.bias, 0)


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
        ("bias", lambda a: a.astype(np.float16), "one form"),
    ],
)
def test_hostile_values_are_refused(field: str, change: object, says: str) -> None:
    with pytest.raises(InvalidTensors, match=says):
        ShiftTensors.from_bytes(safetensors.numpy.save(broken(field, change)), SPEC, 4)


def wire(dtype: str, seed: int = 0) -> dict[str, np.ndarray]:
    return safetensors.numpy.load(random_shift(SPEC, 4, seed).to_bytes(dtype=dtype))


@pytest.mark.parametrize(
    ("dtype", "part", "change", "says"),
    [
        ("float16", "change", lambda a: a * np.float16("inf"), "NaN or infinity"),
        ("float16", "change", lambda a: np.full_like(a, 6e4), "too large"),
        ("float16", "rotation", lambda a: a * np.float16(1.02), "orthonormal"),
        ("float16", "rotation", lambda a: np.repeat(a[:1], 4, 0), "orthonormal"),
        ("float16", "rotation", np.zeros_like, "orthonormal"),
        ("float16", "bias", lambda a: a.astype(np.float32), "one form"),
        ("int8", "change", lambda a: a[:, :-1], "shape"),
        ("int8", "change", lambda a: a.astype(np.float32), "int8"),
        ("int8", "rotation", lambda a: a.astype(np.uint8), "one form"),
        ("int8", "rotation", lambda a: np.repeat(a[:1], 4, 0), "orthonormal"),
        ("int8", "rotation", np.zeros_like, "orthonormal"),
        ("int8", "rotation.scale", lambda a: a * 1.1, "orthonormal"),
        ("int8", "rotation.scale", lambda a: -a, "no scale"),
        ("int8", "rotation.scale", lambda a: a * np.nan, "NaN"),
        ("int8", "rotation.scale", np.zeros_like, "orthonormal"),
        ("int8", "rotation.scale", lambda a: a[:1], "shape"),
        ("int8", "change.scale", lambda a: np.full_like(a, 3e38), "no scale"),
        ("int8", "change.scale", lambda a: np.full_like(a, 100.0), "too large"),
        ("int8", "bias", lambda a: np.full_like(a, 1e6), "too large"),
    ],
)
def test_hostile_rounded_values_are_refused(dtype: str, part: str, change: object, says: str) -> None:
    named = wire(dtype)
    named[f"layers.1.{part}"] = np.ascontiguousarray(change(named[f"layers.1.{part}"]))  # type: ignore[operator]
    with pytest.raises(InvalidTensors, match=says):
        ShiftTensors.from_bytes(safetensors.numpy.save(named), SPEC, 4)


def test_large_steps_excuse_no_rotation() -> None:
    """Steps so large that rounding would explain anything: the rows are the same one four times."""
    named = wire("int8")
    for layer in SPEC.layers:
        row = np.zeros((4, 16), np.int8)
        row[:, 0] = 1
        named |= {f"layers.{layer}.rotation": row, f"layers.{layer}.rotation.scale": np.ones(4, np.float32)}
    with pytest.raises(InvalidTensors, match="orthonormal"):
        ShiftTensors.from_bytes(safetensors.numpy.save(named), SPEC, 4)


def test_the_lowest_int8_is_only_a_number() -> None:
    named = wire("int8")
    named["layers.1.change"][0, 0] = -128
    got = ShiftTensors.from_bytes(safetensors.numpy.save(named), SPEC, 4).layers[1]
    lowest = -128 * named["layers.1.change.scale"][0]
    assert (got.source - got.rotation)[0, 0] == pytest.approx(lowest, rel=1e-5)


@pytest.mark.parametrize("lacking", ["rotation.scale", "change", "bias"])
def test_a_part_that_lacks_or_is_too_much_is_refused(lacking: str) -> None:
    named = wire("int8")
    with pytest.raises(InvalidTensors, match="layers"):
        ShiftTensors.from_bytes(
            safetensors.numpy.save({**named, "layers.1.source": named["layers.1.change"]}), SPEC, 4
        )
    del named[f"layers.1.{lacking}"]
    with pytest.raises(InvalidTensors, match="layers"):
        ShiftTensors.from_bytes(safetensors.numpy.save(named), SPEC, 4)


# -- gradients -----------------------------------------------------------------------------------------


def gradient_of_size(size: float, seed: int = 0) -> ShiftTensors:
    """Numbers over six orders of magnitude, as gradients have."""
    rng = np.random.default_rng(seed)
    noise = {
        name: (rng.standard_normal(a.shape) * 10.0 ** rng.uniform(-6, 0, a.shape) * size).astype(np.float32)
        for name, a in random_shift(SPEC, 4, 0).named()
    }
    return ShiftTensors.from_named(noise)


@pytest.mark.parametrize("size", [0.0, 1e-37, 1e-12, 1.0, 1e30])
def test_gradients_come_back_close_at_any_size(size: float) -> None:
    for seed in range(20):
        gradient = gradient_of_size(size, seed)
        whole = gradient_from_bytes(gradient_to_bytes(gradient, "float32"), SPEC, 4)
        assert whole.digest() == gradient.digest()
        rounded = gradient_from_bytes(gradient_to_bytes(gradient, "float16"), SPEC, 4)
        for (_, got), (_, sent) in zip(rounded.named(), gradient.named(), strict=True):
            np.testing.assert_allclose(got, sent, rtol=2.0**-11, atol=2.0**-24 * np.abs(sent).max())


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_gradients_without_end_are_refused(dtype: str) -> None:
    layers = dict(gradient_of_size(1.0).layers)
    layers[1] = layers[1]._replace(bias=np.full(4, np.nan, np.float32))
    with pytest.raises(InvalidTensors, match="NaN"):
        gradient_to_bytes(ShiftTensors(layers), dtype)


@pytest.mark.parametrize(
    ("part", "change", "says"),
    [
        ("source", lambda a: a * np.float16("nan"), "NaN"),
        ("source", lambda a: a[:-1], "shape"),
        ("source.scale", lambda a: a * np.inf, "NaN or infinity"),
        ("bias.scale", lambda a: np.full_like(a, 3e38), "NaN or infinity"),
        ("bias.scale", lambda a: np.ones(4, np.float32), "shape"),
    ],
)
def test_hostile_gradients_are_refused(part: str, change: object, says: str) -> None:
    named = safetensors.numpy.load(gradient_to_bytes(gradient_of_size(1.0), "float16"))
    named["layers.1.bias"][:] = 2  # beyond what a scale leaves, so that 3e38 of them is too much
    named[f"layers.1.{part}"] = np.ascontiguousarray(change(named[f"layers.1.{part}"]))  # type: ignore[operator]
    with pytest.raises(InvalidTensors, match=says):
        gradient_from_bytes(safetensors.numpy.save(named), SPEC, 4)


def test_there_are_no_other_forms() -> None:
    shift = random_shift(SPEC, 4, 0)
    with pytest.raises(InvalidInput, match="float16, int8"):
        shift.to_bytes(dtype="bfloat16")
    with pytest.raises(InvalidInput, match="float32, float16"):
        gradient_to_bytes(shift, "int8")


def test_a_shift_is_no_gradient_and_a_gradient_no_shift() -> None:
    for dtype in ROUNDED:
        with pytest.raises(InvalidTensors):
            gradient_from_bytes(random_shift(SPEC, 4, 0).to_bytes(dtype=dtype), SPEC, 4)
    with pytest.raises(InvalidTensors):
        ShiftTensors.from_bytes(gradient_to_bytes(gradient_of_size(1.0), "float16"), SPEC, 4)


# -- names and noise -------------------------------------------------------------------------------------


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
    for decode in (ShiftTensors.from_bytes, gradient_from_bytes):
        with pytest.raises(InvalidTensors):
            decode(data, SPEC, 4)


@pytest.mark.parametrize(
    "data", [b"", b"\xff" * 40, struct.pack("<Q", 9) + b"[[[[[[[[[", struct.pack("<Q", 2) + b"[]"]
)
def test_what_is_no_safetensors_has_no_form(data: bytes) -> None:
    with pytest.raises(InvalidTensors):
        wire_dtype(data)


@settings(max_examples=100, deadline=None)
@given(st.data(), st.sampled_from(FORMS))
def test_a_flipped_byte_never_raises_anything_else(data: st.DataObject, dtype: str) -> None:
    raw = bytearray(random_shift(SPEC, 4, 2).to_bytes(dtype=dtype))
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
    for wrong in (
        {"layers": (3, 1)},
        {"layers": ()},
        {"layers": (-1,)},
        {"personal_rank": 0},
        {"collective_rank": 17},
        {"positions": "f7l7"},
    ):
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
