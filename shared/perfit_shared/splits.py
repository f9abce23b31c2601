"""How many examples of a history train a shift, gate it and test it; the one place with this rule.

No numpy here: commands that only list or add examples stay quick.
"""

from __future__ import annotations

__all__ = ["LEAST_HISTORY", "SMALLEST_PART", "folds_for", "split_sizes"]

LEAST_HISTORY = 10  # examples that an update needs: 4 to train, 3 to gate, 3 to test
SMALLEST_PART = 3
_GATE_SHARE, _TEST_SHARE = 0.12, 0.18
_GATE_SHARE_WITH_TEST = 0.15  # where a test part was set apart before
_LEAST_GATE = 10  # examples that can tell a gain from chance
_FOLDS = 3


def split_sizes(examples: int, *, test_apart: bool) -> tuple[int, int, int]:
    """(train, gate, test), oldest examples first.

    70 / 12 / 18 %, at least 3 in gate and test; 85 / 15 / 0 % where a test part was set apart before.
    """
    if test_apart:
        gate = max(SMALLEST_PART, round(examples * _GATE_SHARE_WITH_TEST))
        return examples - gate, gate, 0
    test = max(SMALLEST_PART, round(examples * _TEST_SHARE))
    gate = max(SMALLEST_PART, round(examples * _GATE_SHARE))
    return examples - gate - test, gate, test


def folds_for(gate: int) -> int:
    """How many folds of all examples judge an update instead of its gate, where that is too small to tell."""
    return _FOLDS if 0 < gate < _LEAST_GATE else 0
