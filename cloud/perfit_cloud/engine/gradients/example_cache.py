"""Examples, and where their activations are cached: on the device, in host memory, or nowhere.

What is cached nowhere is computed anew, through the same code, when a pass needs it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from perfit_cloud.engine.gradients.activation_cache import ActivationCache, Examples, Part
from perfit_cloud.model.partial import Indices

__all__ = ["ON_DEVICE", "SPILLED", "CachedBlock", "ExampleCache"]

ON_DEVICE, SPILLED = 0, 1  # where activations are cached
_NOWHERE = -1


class CachedBlock(NamedTuple):
    """Examples that are cached together, and dropped together."""

    where: int
    activations: ActivationCache
    which: Indices
    size: int  # bytes


class ExampleCache:
    """Examples and their cached activations, block by block. Callers lock it where threads share it."""

    def __init__(self, examples: Examples) -> None:
        self.examples = examples
        self.blocks: dict[int, CachedBlock] = {}  # by number
        self._numbers = itertools.count()
        self._block_of = np.full(len(examples.rows), _NOWHERE)
        self._entries = np.zeros(len(examples.rows), dtype=np.int64)  # in its block

    def is_cached(self, which: Indices) -> npt.NDArray[np.bool_]:
        """Of each of these examples."""
        found: npt.NDArray[np.bool_] = self._block_of[which] != _NOWHERE
        return found

    def count(self, where: int) -> int:
        """Examples that are cached there."""
        return sum(len(block.which) for block in self.blocks.values() if block.where == where)

    def add(self, block: CachedBlock) -> None:
        """Let passes read these examples from the cache."""
        number = next(self._numbers)
        self.blocks[number] = block
        self._entries[block.which] = np.arange(len(block.which))
        self._block_of[block.which] = number

    def drop(self, number: int) -> CachedBlock:
        """Overwrite a block; its examples are computed anew from now on."""
        block = self.blocks.pop(number)
        self._block_of[block.which] = _NOWHERE
        block.activations.erase()
        return block

    def parts(self, which: Indices, compute: Callable[[Indices], ActivationCache]) -> Iterator[Part]:
        """These examples as parts of a pass on their device. `compute` gives what is cached nowhere."""
        examples, numbers = self.examples, self._block_of[which]
        for number in np.unique(numbers).tolist():
            there = which[numbers == number]
            if number == _NOWHERE:
                yield Part(examples, there, compute(there), np.arange(len(there)))
                continue
            block, entries = self.blocks[number], self._entries[there]
            if block.where == ON_DEVICE:
                yield Part(examples, there, block.activations, entries)
            else:
                rows, starts = examples.rows[there], examples.starts[there]
                moved = block.activations.moved(entries, rows, starts, examples.ids.device)
                yield Part(examples, there, moved, np.arange(len(there)))
