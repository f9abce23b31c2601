"""Many needles at once in one pass over bytes, by numpy.

A run of 2w bytes holds, wherever it lies, a block of w bytes whose address is a multiple of
min(w, 8): 2w ≥ w + 7. So every w-byte block of the secrets goes into a table, memory is looked at
block by block, and only around a block that is in the table are all 2w bytes compared. A small table of
hashes in front keeps most of memory from the big one.

Blocks of one byte again and again fill any memory, and are left out of the table: a run that holds one
(a float64 beside a zero) is found by its other blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from perfit_cloud.audit.needles import Needle

__all__ = ["MARGIN", "Index", "Match"]

MARGIN = 32  # bytes beside a block that a comparison may look at
_STRIDE = 8  # bytes; blocks of 4 go by 4
_CHUNK = 2**18  # bytes searched at once: their keys stay in the processor's cache
_ODD = np.uint64(0x9E3779B97F4A7C15)  # 2⁶⁴ / golden ratio: multiplying by it spreads keys
_ODD_2 = np.uint64(0xC2B2AE3D27D4EB4F)
_MOST_BITS = 25  # of a table of hashes: 32 MiB

Bytes = npt.NDArray[np.uint8]
Keys = npt.NDArray[np.uint64]
Positions = npt.NDArray[np.int64]


@dataclass
class Match:
    """What was found of one needle."""

    blocks: int = 0
    first: int = 0  # offset in the bytes searched
    spans: set[tuple[int, int, int]] = field(default_factory=set)  # (part, start, stop) of the needle


class Index:
    """Needles, ready to be looked for."""

    def __init__(self, needles: Sequence[Needle]) -> None:
        self.needles = tuple(needles)
        widths = sorted({needle.run // 2 for needle in self.needles})
        self._tables = [_Table(self.needles, width) for width in widths]

    def search(self, data: Bytes, start: int = 0, stop: int | None = None) -> dict[int, Match]:
        """Matches by the needle's number, of blocks that begin in data[start:stop].

        `data` (n) should begin at an address that is a multiple of 8, and so should `start`. What
        lies up to MARGIN bytes beyond [start, stop) is compared with as well.
        """
        found: dict[int, Match] = {}
        stop = len(data) if stop is None else stop
        for table in self._tables:
            for at in range(start, stop, _CHUNK):
                for number, offset, span in table.matches(data, at, min(stop, at + _CHUNK)):
                    match = found.setdefault(number, Match(first=offset))
                    match.blocks += 1
                    match.spans.add(span)
        return found

    def search_unaligned(self, data: bytes) -> dict[int, Match]:
        """As `search`, for bytes such as a file's, where arrays may lie at any offset."""
        found: dict[int, Match] = {}
        for shift in range(_STRIDE):
            for number, match in self.search(np.frombuffer(data, np.uint8)[shift:].copy()).items():
                total = found.setdefault(number, Match(first=match.first + shift))
                total.blocks += match.blocks
                total.spans |= match.spans
        return found


class _Table:
    """The blocks of `width` bytes of all needles whose runs are twice that."""

    def __init__(self, needles: Sequence[Needle], width: int) -> None:
        self._width, self._stride = width, min(width, _STRIDE)
        gap = bytes(2 * width)
        source, owners, distinctive = [gap], [np.full(2 * width, -1)], [np.zeros(2 * width, bool)]
        self._parts: list[tuple[int, int, int]] = []  # (needle, part, where it begins) by owner
        size = 2 * width
        positions: list[Positions] = []
        for number, needle in enumerate(needles):
            if needle.run != 2 * width:
                continue
            for part, data in enumerate(needle.parts):
                distinct = needle.is_distinctive(data)
                positions.append(size + _useful(data, distinct, needle, width))
                source += [data, gap]
                owners += [np.full(len(data), len(self._parts)), np.full(2 * width, -1)]
                distinctive += [distinct, np.zeros(2 * width, bool)]
                self._parts.append((number, part, size))
                size += len(data) + 2 * width
        self._source = np.frombuffer(b"".join(source), np.uint8)
        self._owner = np.concatenate(owners).astype(np.int32)
        # How many distinctive runs begin before each byte.
        self._distinctive = np.concatenate([[0], np.cumsum(np.concatenate(distinctive))])
        self._build(np.concatenate(positions) if positions else np.zeros(0, np.int64))

    def _build(self, positions: Positions) -> None:
        blocks = np.lib.stride_tricks.sliding_window_view(self._source, self._width)[positions]
        keys = _keys(np.ascontiguousarray(blocks).reshape(-1), self._width, self._width)
        order = np.argsort(keys, kind="stable")
        self._positions = positions[order]
        self._keys, self._starts = np.unique(keys[order], return_index=True)
        self._counts = np.diff(np.append(self._starts, len(positions)))
        self._bits = np.uint64(min(_MOST_BITS, max(12, len(self._keys).bit_length() + 3)))
        self._sieves = []
        for factor in (_ODD, _ODD_2):
            sieve = np.zeros(2 ** int(self._bits), bool)
            sieve[self._hash(self._keys, factor)] = True
            self._sieves.append((factor, sieve))

    def matches(self, data: Bytes, start: int, stop: int) -> Iterator[tuple[int, int, tuple[int, int, int]]]:
        """(needle, offset in data, (part, start, stop)) of every block in data[start:stop] that counts."""
        if not len(self._keys):
            return
        # A pair of words across `stop` is left out: its run holds another pair, on one side or the other.
        keys = _keys(data[start:stop], self._width, self._stride)
        hits = self._passing(keys)
        if not len(hits):
            return
        found = np.searchsorted(self._keys, keys[hits])
        found[found == len(self._keys)] = 0
        is_same = self._keys[found] == keys[hits]
        at, found = start + hits[is_same] * self._stride, found[is_same]
        most = int(self._counts[found].max(initial=0))
        for turn in range(most):  # a block may stand in several places of the secrets
            more = self._counts[found] > turn
            at, found = at[more], found[more]
            yield from self._compare(data, at, self._positions[self._starts[found] + turn])

    def _compare(
        self, data: Bytes, at: Positions, position: Positions
    ) -> Iterator[tuple[int, int, tuple[int, int, int]]]:
        """Of blocks at data[at] that may be those at source[position], those within a run that counts."""
        width = self._width
        around = np.arange(-width, 2 * width)
        there = at[:, None] + around
        is_inside = (there >= 0) & (there < len(data))
        sources = position[:, None] + around
        same = (data[np.clip(there, 0, len(data) - 1)] == self._source[sources]) & is_inside
        same &= self._owner[sources] == self._owner[position][:, None]
        left = np.minimum.accumulate(same[:, :width][:, ::-1], axis=1).sum(1)
        right = np.minimum.accumulate(same[:, 2 * width :], axis=1).sum(1)
        first, last = position - left, position + width + right - 2 * width  # where a run may begin
        is_run = same[:, width : 2 * width].all(1) & (first <= last)
        is_run &= self._distinctive[np.maximum(first, last + 1)] > self._distinctive[first]
        for row in np.flatnonzero(is_run):
            needle, part, begin = self._parts[self._owner[position[row]]]
            span = (part, int(first[row] - begin), int(last[row] - begin) + 2 * width)
            yield needle, int(at[row]), span

    def _passing(self, keys: Keys) -> Positions:
        """Which of the keys may be in the table."""
        (first, sieve), (second, other) = self._sieves
        hits = np.flatnonzero(sieve.take(self._hash(keys, first)))
        return hits[other.take(self._hash(keys[hits], second))]

    def _hash(self, keys: Keys, factor: np.uint64) -> Positions:
        hashes = keys * factor
        hashes >>= np.uint64(64) - self._bits
        return hashes.view(np.int64)


def _useful(part: bytes, distinct: npt.NDArray[np.bool_], needle: Needle, width: int) -> Positions:
    """Where in a part blocks begin that a distinctive run holds, and that an aligned address can."""
    if len(distinct) < 2 * width:
        return np.zeros(0, np.int64)
    runs = np.concatenate([[0], np.cumsum(distinct)])
    begins = np.arange(0, len(distinct) - width + 1, min(needle.item, _STRIDE, width))
    begins = begins[runs[begins + 1] > runs[np.maximum(begins - width, 0)]]
    blocks = np.lib.stride_tricks.sliding_window_view(np.frombuffer(part, np.uint8), width)[begins]
    distinctive: Positions = begins[(blocks != blocks[:, :1]).any(1)]
    return distinctive


def _keys(data: Bytes, width: int, stride: int) -> Keys:
    """One number for each block of `width` bytes, of blocks that begin `stride` apart."""
    if width == 4:
        return data[: len(data) // 4 * 4].view(np.uint32).astype(np.uint64)
    words = data[: len(data) // 8 * 8].view(np.uint64)
    if width == 8:
        return words
    if stride == width:
        words = words.reshape(-1, 2)
        return words[:, 0] * _ODD_2 ^ words[:, 1]
    return words[:-1] * _ODD_2 ^ words[1:]
