"""Whether one shift is better than another on examples that neither was trained on."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise

from perfit_shared.types import Score

__all__ = ["Comparison", "chosen_by_others", "mean_loss"]

_PARTS = 3


@dataclass(frozen=True)
class Comparison:
    """The same held-out examples, scored under one shift and under another.

    The difference is taken example by example, since examples differ far more from each other than one
    shift from another on the same example. What is left of chance is the mean's standard error.
    """

    before: Sequence[Score]
    after: Sequence[Score]

    @property
    def gain(self) -> float:
        """By how many nats a token the loss fell."""
        return mean_loss(self.before) - mean_loss(self.after)

    @property
    def error(self) -> float:
        """Standard error of `gain`, from the differences of the examples; infinite for a single one."""
        pairs = zip(self.before, self.after, strict=True)
        gains = [after.log_likelihood - before.log_likelihood for before, after in pairs]
        count, mean = len(gains), sum(gains) / len(gains)
        if count < 2:
            return math.inf
        spread = math.sqrt(sum((gain - mean) ** 2 for gain in gains) / (count - 1))
        return math.sqrt(count) * spread / sum(score.tokens for score in self.after)

    @property
    def is_better(self) -> bool:
        """Whether the gain is more than its standard error: one that is none passes about one time in six."""
        return self.gain > self.error

    @property
    def is_worse(self) -> bool:
        """Whether the loss is more than its standard error."""
        return self.gain < -self.error

    def of(self, rows: Collection[int]) -> Comparison:
        """Of some of the examples."""
        return Comparison([self.before[row] for row in rows], [self.after[row] for row in rows])


def mean_loss(scores: Sequence[Score]) -> float:
    """Nats a token."""
    return -sum(score.log_likelihood for score in scores) / sum(score.tokens for score in scores)


def chosen_by_others(judgements: Sequence[Sequence[Score]]) -> list[Score]:
    """Each example's score at one of the judgements: that at which the other two thirds lose least.

    So no example has a say in what it judges.
    """
    count = len(judgements[0])
    ends = [part * count // _PARTS for part in range(_PARTS + 1)]
    chosen: list[Score] = []
    for start, end in pairwise(ends):
        best = min(judgements, key=lambda scores: _loss_without(scores, start, end))
        chosen += best[start:end]
    return chosen


def _loss_without(scores: Sequence[Score], start: int, end: int) -> float:
    """Nats of all examples but some; sums rank judgements as means do."""
    return -sum(score.log_likelihood for score in (*scores[:start], *scores[end:]))
