"""What an auditor looks for: every short run of a secret, in every form that a server may hold it in.

A needle has a kind ("tensor fp32", "prompt text utf-8"), bytes, and the length of the shortest run of
them that counts: 16 bytes of a tensor, a gradient or token ids as int32, 4 ids as int64, 8 letters of a
text. Runs that could stand anywhere, such as zeros or one number again and again, count for nothing.
"""

from __future__ import annotations

import string
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import safetensors.numpy

from perfit_shared.shifts import ShiftSpec, ShiftTensors

__all__ = [
    "LETTERS",
    "Needle",
    "canary_words",
    "gradient_forms",
    "gradient_sent",
    "raw",
    "tensor_forms",
    "text",
    "token_ids",
]

LETTERS = 8  # of a canary word, and of a run of a text that counts
_IDS = 4  # in a run that counts
_TENSOR_RUN = 16  # bytes
_ENCODINGS = {"utf-8": 1, "latin-1": 1, "ucs-2": 2, "ucs-4": 4}  # and the bytes of a letter of ASCII
_CODECS = {"utf-8": "utf-8", "latin-1": "latin-1", "ucs-2": "utf-16-le", "ucs-4": "utf-32-le"}

Bytes = npt.NDArray[np.uint8]
Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Needle:
    """One form of one secret."""

    kind: str
    parts: tuple[bytes, ...]  # a run lies within one of them
    run: int = _TENSOR_RUN  # 8, 16 or 32: bytes of the shortest run that counts
    # Bytes of an item: in memory an array lies at a multiple of it. 1 where it may lie anywhere.
    item: int = 1

    def without(self, spans: Iterable[tuple[int, int, int]]) -> Needle:
        """Without the runs (part, start, stop), which turned out to stand in public places."""
        cuts: dict[int, list[tuple[int, int]]] = {}
        for number, start, stop in spans:
            cuts.setdefault(number, []).append((start, stop))
        kept: list[bytes] = []
        for number, part in enumerate(self.parts):
            begin = 0
            for start, stop in sorted(cuts.get(number, [])):
                kept.append(part[begin : start + self.run - 1])
                begin = max(begin, stop - self.run + 1)
            kept.append(part[begin:])
        return Needle(self.kind, tuple(part for part in kept if len(part) >= self.run), self.run, self.item)

    def is_distinctive(self, part: bytes) -> npt.NDArray[np.bool_]:
        """Whether the run that starts at each byte of a part says something, by its distinct items."""
        data = np.frombuffer(part, np.uint8)
        starts = np.zeros(len(data), bool)
        items = data[: len(data) // self.item * self.item].view(f"u{self.item}")
        count = self.run // self.item
        if len(items) < count:
            return starts
        windows = np.sort(np.lib.stride_tricks.sliding_window_view(items, count), axis=1)
        distinct = 1 + (np.diff(windows, axis=1) != 0).sum(1)
        starts[: len(distinct) * self.item : self.item] = distinct >= min(6, count // 2 + 1)
        return starts


# -- tensors and gradients -----------------------------------------------------------------------


def tensor_forms(data: bytes, spec: ShiftSpec) -> Iterator[Needle]:
    """The needles of a personal shift as it was sent: its bytes, and what they decode to.

    Decoded by the code that the server uses, so that rotations made orthonormal again are the same bits.
    """
    yield raw("tensor as sent", _payload(data))
    sent = safetensors.numpy.load(data)
    yield from _floats("tensor fp64", [a for a in sent.values() if a.dtype != np.int8], np.float64)
    arrays = []
    for shift in ShiftTensors.from_bytes(data, spec, spec.personal_rank).layers.values():
        arrays += [*shift, shift.source - shift.rotation]
    for name, dtype in (("fp64", np.float64), ("fp32", np.float32), ("fp16", np.float16)):
        yield from _floats(f"tensor {name}", arrays, dtype)
    yield _brain_floats("tensor bf16", arrays)


def gradient_sent(reply: bytes) -> Needle:
    """The needle of a gradient's bytes as they came."""
    return raw("gradient as sent", _payload(reply))


def gradient_forms(gradient: ShiftTensors) -> Iterator[Needle]:
    """The needles of a gradient as the engine makes it, and as it is rounded for the wire."""
    arrays = [array for _, array in gradient.named()]
    for name, dtype in (("fp32", np.float32), ("fp16", np.float16)):
        yield from _floats(f"gradient {name}", arrays, dtype)
    yield _brain_floats("gradient bf16", arrays)
    # float16 on the wire is divided by a scale first (perfit_shared.shifts).
    scaled = [array / (np.abs(array).max() or 1) for array in arrays]
    yield from _floats("gradient fp16 scaled", scaled, np.float16)


def raw(kind: str, data: bytes) -> Needle:
    """Bytes that may lie anywhere."""
    return Needle(kind, (data,))


def _payload(data: bytes) -> bytes:
    """safetensors bytes without the header, which everybody knows."""
    return data[8 + int.from_bytes(data[:8], "little") :]


def _floats(
    kind: str, arrays: Iterable[npt.NDArray[np.generic]], dtype: type[np.floating]
) -> Iterator[Needle]:
    with np.errstate(over="ignore"):
        cast = [array.astype(dtype) for array in arrays]
    yield Needle(kind, _both_ways(cast), item=np.dtype(dtype).itemsize)


def _brain_floats(kind: str, arrays: Iterable[Array]) -> Needle:
    """bfloat16 as torch rounds it: to nearest, ties to even."""
    cast = []
    for array in arrays:
        bits = np.ascontiguousarray(array, np.float32).view(np.uint32)
        cast.append(((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16))
    return Needle(kind, _both_ways(cast), item=2)


def _both_ways(arrays: Iterable[npt.NDArray[np.generic]]) -> tuple[bytes, ...]:
    """Each array by rows, and (a copy may be transposed) by columns."""
    return tuple(
        part.tobytes() for array in arrays for part in ((array, array.T) if array.ndim == 2 else (array,))
    )


# -- text and ids --------------------------------------------------------------------------------


def canary_words(rng: np.random.Generator, count: int) -> list[str]:
    """Random words of 8 letters, which stand in no vocabulary and in no template."""
    letters = np.array(list(string.ascii_lowercase))
    return ["".join(rng.choice(letters, LETTERS)) for _ in range(count)]


def text(kind: str, texts: Iterable[str]) -> Iterator[Needle]:
    """Every 8 characters in a row, in the encodings that Python, Rust and protobuf hold text in."""
    texts = [t for t in texts if len(t) >= LETTERS]
    for name, size in _ENCODINGS.items():
        parts = dict.fromkeys(t.encode(_CODECS[name], "ignore") for t in texts)
        if name == "latin-1":  # says something new only beyond ASCII
            parts = dict.fromkeys(p for p in parts if not p.isascii())
        if parts:
            yield Needle(f"{kind} {name}", tuple(parts), run=LETTERS * size, item=size)


def token_ids(kind: str, sequences: Iterable[Sequence[int]]) -> Iterator[Needle]:
    """Every 4 token ids in a row."""
    sequences = [list(s) for s in sequences if len(s) >= _IDS]
    for name, dtype in (("int32", np.int32), ("int64", np.int64)):
        parts = dict.fromkeys(np.array(s, dtype).tobytes() for s in sequences)
        size = np.dtype(dtype).itemsize
        yield Needle(f"{kind} {name}", tuple(parts), run=_IDS * size, item=size)
