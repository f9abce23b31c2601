"""Bad inputs as hypothesis strategies: edited samples, hostile JSON, hostile protobuf, hostile tensors."""

from __future__ import annotations

import copy
import json
import struct
from collections.abc import Mapping, Sequence
from operator import mul
from typing import Any

import numpy as np
import safetensors.numpy
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from hypothesis import strategies as st

from perfit_shared.shifts import ShiftTensors

__all__ = ["TEXT", "edited", "edited_json", "forms_of", "messages", "mostly", "spliced", "tensor_bytes"]

Bytes = st.SearchStrategy[bytes]
# What UTF-8 can carry: protobuf takes no lone surrogates.
TEXT = (
    st.text(st.characters(codec="utf-8"), max_size=40)
    | st.sampled_from(
        [
            "",
            " ",
            "\0",
            "{",
            "{}",
            "{0}",
            "{text",
            "{text!r:>9999999}",
            "\u2028",
            "\u202e",
            "<s>",
            "</s>",
            "the cat sat on the mat",
            "<|endoftext|>",
            "../../etc",
            "f7+l7",
        ]
    )
    | st.builds(mul, st.sampled_from("aé𝔘\n "), st.sampled_from([63, 64, 65, 200, 5000]))
)
_ODD: list[Any] = [
    None,
    True,
    False,
    0,
    1,
    -1,
    2,
    7,
    1.5,
    -0.0,
    1e308,
    float("nan"),
    float("inf"),
    -(2**63),
    2**31,
    2**32,
    2**63,
    2**200,
    "",
    " ",
    "a",
    "7",
    "1e999",
    "\ud800",
    "\0",
    [],
    {},
    [[]],
    [None],
    {"": ""},
    "f7+l7",
]
_SCALARS = st.sampled_from(_ODD) | st.integers() | st.floats() | TEXT | st.just("x").map(lambda x: x * 70_000)
_JSON = st.recursive(
    _SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=8,
)
_KINDS = ("flip", "set", "delete", "insert", "repeat", "cut", "number", "zeros")
_NUMBERS = [
    struct.pack(form, value)
    for form in ("<Q", ">Q", "<I", ">H")
    for value in (0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF)
] + [b"\xff" * 8, b"\x7f" + b"\xff" * 7, b"\xff" * 7 + b"\x7f", b"\xff" * 4]
_EDITS = st.lists(
    st.tuples(
        st.sampled_from(_KINDS),
        st.integers(0, 2**20),
        st.integers(0, 255),
        st.binary(max_size=12),
        st.sampled_from(_NUMBERS),
    ),
    min_size=1,
    max_size=5,
)


def mostly(often: st.SearchStrategy[Any], *seldom: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Three times in four the first. one_of takes a strategy that is named twice for one."""
    return st.integers(0, 3).flatmap(lambda number: st.one_of(seldom) if number == 3 else often)


def _of(samples: Sequence[Any]) -> st.SearchStrategy[Any]:
    """As sampled_from, which prints them all when hypothesis looks at its repr."""
    return st.integers(0, len(samples) - 1).map(lambda number: samples[number])


def edited(samples: Sequence[bytes]) -> Bytes:
    """A sample after one to five edits, two of them spliced, or bytes out of nowhere."""
    return st.one_of(st.builds(_apply, _of(samples), _EDITS), spliced(samples), st.binary(max_size=200))


def spliced(samples: Sequence[bytes]) -> Bytes:
    """The beginning of one sample and the end of another."""

    def splice(one: bytes, other: bytes, at: int, past: int) -> bytes:
        return one[: at % (len(one) + 1)] + other[past % (len(other) + 1) :]

    place = st.integers(0, 2**20)
    return st.builds(splice, _of(samples), _of(samples), place, place)


def _apply(data: bytes, edits: list[tuple[str, int, int, bytes, bytes]]) -> bytes:
    out = bytearray(data)
    for kind, place, size, filler, number in edits:
        at = place % (len(out) + 1)
        if kind == "flip" and at < len(out):
            out[at] ^= 1 << size % 8
        elif kind == "set" and at < len(out):
            out[at] = size
        elif kind == "delete":
            del out[at : at + size]
        elif kind == "insert":
            out[at:at] = filler
        elif kind == "repeat":
            out[at:at] = out[at : at + size] * (1 + size % 3)
        elif kind == "cut":
            del out[at:]
        elif kind == "number":
            out[at : at + len(number)] = number
        elif kind == "zeros":
            out[at : at + size] = bytes(len(out[at : at + size]))
    return bytes(out)


# -- JSON ------------------------------------------------------------------------------------------


def edited_json(samples: Sequence[Any]) -> st.SearchStrategy[str]:
    """JSON text of a sample with one to three places replaced, removed, added or nested; or of no sample."""
    kinds = mostly(st.just("set"), st.sampled_from(("drop", "add", "wrap")))
    edit = st.tuples(kinds, st.integers(0, 2**16), st.sampled_from(_ODD) | _JSON, TEXT)
    built = st.builds(_edit_json, _of(samples), st.lists(edit, min_size=1, max_size=3))
    deep = st.integers(1, 20_000).map(lambda depth: "[" * depth + "]" * depth)
    texts = [json.dumps(sample).encode() for sample in samples]
    raw = edited(texts).map(lambda data: data.decode("utf-8", "replace"))
    # Python writes NaN and Infinity, which its reader takes: so may an attacker.
    return mostly(built.map(json.dumps), _JSON.map(json.dumps), deep, raw)


def _edit_json(sample: Any, edits: list[tuple[str, int, Any, str]]) -> Any:
    root = [copy.deepcopy(sample)]
    for kind, place, shared, key in edits:
        value = copy.deepcopy(shared)  # the strategy keeps what it drew
        places = list(_places(root))
        holder, index = places[place % len(places)]
        if kind == "set":
            holder[index] = value
        elif kind == "drop" and holder is not root:
            del holder[index]
        elif kind == "add" and isinstance(holder[index], dict):
            holder[index][key] = value
        elif kind == "add" and isinstance(holder[index], list):
            holder[index].append(value)
        elif kind == "wrap":
            holder[index] = [holder[index]]
    return root[0]


def _places(node: Any) -> Any:
    """(container, index or key) of everything inside."""
    for index in list(node) if isinstance(node, dict) else range(len(node)):
        yield node, index
        if isinstance(node[index], dict | list):
            yield from _places(node[index])


# -- tensors ---------------------------------------------------------------------------------------

_HOSTILE_FLOATS = st.sampled_from([0.0, -0.0, 1.0, 1e-45, 3e38, -3e38, 65504.0, 199.0, 201.0, np.nan, np.inf])


def tensor_bytes(samples: Sequence[bytes]) -> Bytes:
    """Safetensors: edited bytes, a sound frame around a hostile header, sound layout with hostile numbers."""
    headers = [_header_of(sample) for sample in samples]
    bodies = [sample[8 + int.from_bytes(sample[:8], "little") :] for sample in samples]
    reframed = st.builds(_frame, edited_json(headers), _of(bodies))
    return st.one_of(edited(samples), reframed, _with_numbers(samples))


def _header_of(data: bytes) -> Any:
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])


def _frame(header: str, body: bytes) -> bytes:
    text = header.encode("utf-8", "surrogatepass")
    return len(text).to_bytes(8, "little") + text + body


def _with_numbers(samples: Sequence[bytes]) -> Bytes:
    def change(data: bytes, which: int, place: int, value: float, kind: str) -> bytes:
        named = {name: array.copy() for name, array in safetensors.numpy.load(data).items()}
        name = sorted(named)[which % len(named)]
        array = named[name]
        with np.errstate(all="ignore"):
            if kind == "one":
                whole = array.dtype.kind == "i"
                array.reshape(-1)[place % array.size] = place % 256 - 128 if whole else value
            elif kind == "scale":
                named[name] = (array * np.float32(value)).astype(array.dtype)
            elif kind == "dtype":
                dtype = (np.float64, np.float16, np.int8, np.int64, np.bool_)[place % 5]
                named[name] = array.astype(dtype)
            elif kind == "shape":
                named[name] = np.resize(array, (place % 7, which % 40))
            elif kind == "drop":
                del named[name]
            else:
                named[f"layers.{place}.rotation"] = array
        return safetensors.numpy.save(named or {"x": np.zeros(1, np.float32)})

    place = st.integers(0, 2**16)
    kinds = st.sampled_from(("one", "scale", "dtype", "shape", "drop", "more"))
    return st.builds(change, _of(samples), place, place, _HOSTILE_FLOATS, kinds)


def forms_of(tensors: ShiftTensors) -> list[bytes]:
    """A shift in every form of the wire."""
    return [tensors.to_bytes(dtype=form) for form in ("float32", "float16", "int8")]


# -- protobuf --------------------------------------------------------------------------------------

_UNSIGNED = st.integers(0, 9) | st.sampled_from([48, 255, 256, 2**16, 2**31 - 1, 2**31, 2**32 - 1])
_BY_TYPE: dict[int, st.SearchStrategy[Any]] = {
    FieldDescriptor.TYPE_STRING: TEXT,
    FieldDescriptor.TYPE_BYTES: st.binary(max_size=64),
    FieldDescriptor.TYPE_BOOL: st.booleans(),
    FieldDescriptor.TYPE_UINT32: _UNSIGNED,
    FieldDescriptor.TYPE_UINT64: _UNSIGNED | st.just(2**64 - 1),
    FieldDescriptor.TYPE_FLOAT: st.floats(width=32),
    FieldDescriptor.TYPE_ENUM: st.integers(-1, 5) | st.just(2**31 - 1),
}


def messages(kind: type[Message], hints: Mapping[str, st.SearchStrategy[Any]]) -> st.SearchStrategy[Any]:
    """Any message of this kind. A field whose name is in `hints` takes its values from there, mostly."""
    known: dict[str, st.SearchStrategy[Any]] = {}
    return _messages(kind.DESCRIPTOR, hints, known)


def _messages(descriptor: Any, hints: Mapping[str, Any], known: dict[str, Any]) -> st.SearchStrategy[Any]:
    if descriptor.full_name not in known:
        always: dict[str, Any] = {}
        sometimes: dict[str, Any] = {}
        for field in descriptor.fields:
            # What is wanted is mostly there, or the first check of all would refuse nearly every message.
            wanted = field.name in hints or (field.message_type is not None and not field.is_repeated)
            fields = always if wanted and field.containing_oneof is None else sometimes
            fields[field.name] = _field(field, hints, known)
        made = GetMessageClass(descriptor)
        known[descriptor.full_name] = st.fixed_dictionaries(always, optional=sometimes).map(
            lambda values: made(**values)
        )
    return known[descriptor.full_name]


def _field(field: Any, hints: Mapping[str, Any], known: dict[str, Any]) -> st.SearchStrategy[Any]:
    one = _BY_TYPE[field.type] if field.message_type is None else _messages(field.message_type, hints, known)
    if field.name in hints:
        one = mostly(hints[field.name], one)
    return st.lists(one, max_size=4) if field.is_repeated else one
