"""Which examples train a shift, which gate it, and which only test it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from perfit_device.history.items import HistoryItem
from perfit_shared.errors import InvalidData

__all__ = ["MINIMUM", "Split", "split"]

MINIMUM = 10  # examples that an update needs: 4 to train, 3 to gate, 3 to test
_SMALLEST_PART = 3
_GATE_SHARE, _TEST_SHARE = 0.12, 0.18
_GATE_SHARE_WITH_TEST = 0.15  # where the file set its own test part apart


@dataclass(frozen=True)
class Split:
    """A history by time. `train` and `gate` make the shift; `test` is for `evaluate` alone."""

    train: Sequence[HistoryItem]
    gate: Sequence[HistoryItem]
    test: Sequence[HistoryItem]

    def digest(self) -> str:
        """sha-256 over what an update reads, hex: an interrupted update resumes on the same."""
        text = json.dumps([[i.name for i in self.train], [i.name for i in self.gate]])
        return hashlib.sha256(text.encode()).hexdigest()


def split(items: Iterable[HistoryItem]) -> Split:
    """Oldest to train on, then the gate, and the newest to test; the one place with this rule.

    70 / 12 / 18 %, at least 3 in gate and test. Where a file set a test part apart that part is
    the test, and the rest goes 85 / 15 to train and gate. Raises InvalidData on fewer than 10 in all,
    or fewer than 7 beside a test part.
    """
    ordered = sorted(items, key=lambda i: (i.date, i.order))
    test = [i for i in ordered if i.part == "test"]
    rest = [i for i in ordered if i.part != "test"]
    needed = MINIMUM - _SMALLEST_PART if test else MINIMUM
    if len(rest) < needed:
        raise InvalidData(
            f"there are {len(rest)} examples to learn from, and at least {needed} are needed; "
            "add some with `perfit history add` or `perfit history import`"
        )
    if not test:
        count = max(_SMALLEST_PART, round(len(rest) * _TEST_SHARE))
        rest, test = rest[:-count], rest[-count:]
        gate_count = max(_SMALLEST_PART, round(len(ordered) * _GATE_SHARE))
    else:
        gate_count = max(_SMALLEST_PART, round(len(rest) * _GATE_SHARE_WITH_TEST))
    return Split(train=rest[:-gate_count], gate=rest[-gate_count:], test=test)
