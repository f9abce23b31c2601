"""Which examples train a shift, which gate it, and which only test it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from perfit_device.history.items import HistoryItem
from perfit_shared.errors import InvalidData
from perfit_shared.splits import LEAST_HISTORY, SMALLEST_PART, folds_for, split_sizes

__all__ = ["Split", "split"]


@dataclass(frozen=True)
class Split:
    """A history by time. `train` and `gate` make the shift; `test` is for `evaluate` alone."""

    train: Sequence[HistoryItem]
    gate: Sequence[HistoryItem]
    test: Sequence[HistoryItem]

    @property
    def trained(self) -> list[HistoryItem]:
        """Those that an update learns from: in folds the gate's part, too."""
        return [*self.train, *(self.gate if folds_for(len(self.gate)) else ())]

    def digest(self) -> str:
        """sha-256 over what an update reads, hex: an interrupted update resumes on the same."""
        text = json.dumps([[i.name for i in self.train], [i.name for i in self.gate]])
        return hashlib.sha256(text.encode()).hexdigest()


def split(items: Iterable[HistoryItem]) -> Split:
    """Oldest to train on, then the gate, and the newest to test, by `split_sizes`.

    Where a file set a test part apart, that part is the test. Raises InvalidData on fewer than 10 in
    all, or fewer than 7 beside a test part.
    """
    ordered = sorted(items, key=lambda i: (i.date, i.order))
    test = [i for i in ordered if i.part == "test"]
    rest = [i for i in ordered if i.part != "test"]
    needed = LEAST_HISTORY - SMALLEST_PART if test else LEAST_HISTORY
    if len(rest) < needed:
        raise InvalidData(
            f"there are {len(rest)} examples to learn from, and at least {needed} are needed; "
            "add some with `perfit history add` or `perfit history import`"
        )
    train, gate, _ = split_sizes(len(rest), test_apart=bool(test))
    return Split(train=rest[:train], gate=rest[train : train + gate], test=test or rest[train + gate :])
