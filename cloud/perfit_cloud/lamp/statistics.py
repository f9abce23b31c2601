"""How sure a number is: bootstrap intervals and paired tests, both clustered by user.

The queries of one user are alike, so a user is the unit: a resample draws users and takes all their
queries. A `Statistic` is anything that follows from sums over users, so a resample costs an addition.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import stats

__all__ = ["PERMUTATIONS", "RESAMPLES", "Paired", "Statistic", "interval", "paired"]

Array = npt.NDArray[np.float64]
Interval = tuple[float, float]

RESAMPLES = 2_000  # of the bootstrap
PERMUTATIONS = 9_999  # of the test; up to 13 users all 2^users are tried instead, so p is exact
_SEED = 0  # the same figures every time
_BATCH = 2**22  # numbers gathered at once: 32 MB


@dataclass(frozen=True)
class Statistic:
    """`combine(sums.sum(0))`, and `combine(sums)` for each user alone."""

    sums: Array  # (users, K)
    combine: Callable[[Array], Array]  # (..., K) → (...)
    higher_is_better: bool
    # How far a value is from the best one, of a measure that is best in between.
    miss: Callable[[float], float] | None = None

    @classmethod
    def mean(cls, values: npt.ArrayLike, *, higher_is_better: bool) -> Statistic:
        """The mean over users of one value each, (users,)."""
        column = np.asarray(values, float)
        return cls(np.stack([column, np.ones_like(column)], 1), _ratio, higher_is_better)

    @property
    def value(self) -> float:
        return float(self.combine(self.sums.sum(0)))

    @property
    def by_user(self) -> Array:
        """(users,)"""
        return self.combine(self.sums)

    @property
    def merit_by_user(self) -> Array:
        """(users,), higher is better."""
        if self.miss is not None:
            return -np.array([self.miss(float(value)) for value in self.by_user])
        return self.by_user if self.higher_is_better else -self.by_user


def _ratio(sums: Array) -> Array:
    return np.asarray(sums[..., 0] / sums[..., 1])


@dataclass(frozen=True)
class Paired:
    """Two results of the same users. `difference` is a − b; a None could not be computed."""

    a: float
    b: float
    difference: float
    interval: Interval | None  # of the difference, 95 %
    p: float | None  # two-sided
    better: int  # users for whom a is better
    worse: int
    of: int  # users


def interval(statistic: Statistic) -> Interval | None:
    """95 % bootstrap interval over users; None for fewer than two users or a value that is no number.

    Bias-corrected and accelerated (BCa): resamples miss rare labels, which drags macro-F1 down, and
    a plain percentile interval would keep that bias. Where BCa is undefined, the percentile interval.
    """
    sums = statistic.sums
    return _bootstrap(lambda rows: statistic.combine(sums[rows].sum(-2)), sums, len(sums))


def paired(a: Statistic, b: Statistic) -> Paired:
    """Compare two statistics of one kind, row u of both being the same user.

    The test is a permutation test: under the null hypothesis a user's two results may as well be
    swapped, all queries at once. For a mean over users this flips the signs of their differences.
    Rather this than Wilcoxon's: it tests the very number that is reported, users without any
    difference need no rule, and with few users it is exact.
    """
    users, both = len(a.sums), np.concatenate([a.sums, b.sums])

    def difference(x: npt.NDArray[Any], y: npt.NDArray[Any], axis: int = -1) -> Array:
        """Rows of `both` that count as a and as b, (..., users) → (...)."""
        gap = a.combine(both[x].sum(axis - 1)) - a.combine(both[y].sum(axis - 1))
        return np.round(gap, 12)  # else rounding would break ties

    bounds = _bootstrap(lambda rows: difference(rows, rows + users), both, users)
    one, two = a.merit_by_user, b.merit_by_user
    p = None
    if users > 1 and np.isfinite(both).all():
        rows = np.arange(users)
        found = stats.permutation_test(
            (rows, rows + users),
            difference,
            permutation_type="samples",
            vectorized=True,
            axis=-1,
            n_resamples=PERMUTATIONS,
            batch=_batch(both),
            rng=np.random.default_rng(_SEED),
        )
        p = float(found.pvalue)
    return Paired(
        a=a.value,
        b=b.value,
        difference=a.value - b.value,
        interval=bounds,
        p=p,
        better=int((one > two).sum()),
        worse=int((one < two).sum()),
        of=users,
    )


def _bootstrap(of: Callable[[npt.NDArray[Any]], Array], sums: Array, users: int) -> Interval | None:
    """`of`: drawn users (..., users) → (...). `sums`: what it gathers from."""
    if users < 2 or not np.isfinite(sums).all():
        return None

    def statistic(rows: npt.NDArray[Any], axis: int) -> Array:
        return of(rows.astype(np.intp))  # scipy makes floats of the jackknife's rows

    done: Any = None
    for method in ("BCa", "percentile"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a degenerate distribution; it comes back as NaN
            done = stats.bootstrap(
                (np.arange(users),),
                statistic,
                vectorized=True,
                method=method,
                bootstrap_result=done,
                n_resamples=0 if done else RESAMPLES,
                batch=_batch(sums),
                rng=np.random.default_rng(_SEED),
            )
        low, high = map(float, done.confidence_interval)
        if math.isfinite(low) and math.isfinite(high):
            return low, high
    return None


def _batch(sums: Array) -> int:
    """How many resamples to gather at once."""
    return max(1, _BATCH // sums.size)
