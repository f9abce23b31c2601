"""What a matrix of δ-vectors is made of: its singular values, ranks, and users' coordinates.

Ranks are of the matrix as it is, not of its deviations from the mean: the direction that users share is then
the first one, as the paper's figures imply (its zeroth coordinate has a mean away from zero). Ranks with the
mean taken out stand beside them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["DIRECTIONS", "SHARES", "BlockStatistics", "Spectrum", "coordinates", "spectrum", "statistics_of"]

Array = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
SHARES = (0.8, 0.85, 0.9, 0.95)
DIRECTIONS = 5  # kept of every block
_CHUNK = 1024  # users in memory where they are more than the model is wide


@dataclass(frozen=True)
class Spectrum:
    energies: Doubles  # squared singular values, largest first
    directions: Doubles  # (≤ 5, d), each towards the mean
    mean: Doubles  # (d,)

    def rank(self, share: float) -> int:
        """The smallest r whose first r directions explain that share of the squares; 0 of nothing."""
        total = self.energies.sum()
        if not total:
            return 0
        explained = np.cumsum(self.energies) / total
        return int(np.searchsorted(explained, share - 1e-12)) + 1


def spectrum(rows: Array | Doubles, *, centred: bool = False) -> Spectrum:
    """Of rows (N, d), in float64. Memory holds at most d × d numbers however many rows there are."""
    count, width = rows.shape
    mean = sum((chunk.sum(0) for chunk in _chunks(rows)), np.zeros(width)) / count
    away = mean if centred else np.zeros(width)
    if count <= width:
        _, values, directions = np.linalg.svd(rows.astype(np.float64) - away, full_matrices=False)
        energies = values**2
    else:
        gram = np.zeros((width, width))
        for chunk in _chunks(rows):
            gram += (chunk - away).T @ (chunk - away)
        values, vectors = np.linalg.eigh(gram)
        energies, directions = values[::-1].clip(min=0), vectors.T[::-1]
    kept = directions[:DIRECTIONS]
    return Spectrum(energies, kept * np.where(kept @ mean < 0, -1.0, 1.0)[:, None], mean)


def coordinates(rows: Array | Doubles, directions: Doubles) -> Doubles:
    """Rows (N, d) along directions (m, d): (N, m)."""
    return np.concatenate([chunk @ directions.T for chunk in _chunks(rows)])


@dataclass(frozen=True)
class BlockStatistics:
    block: int
    ranks: dict[str, int]  # by share, "0.8"
    centred_ranks: dict[str, int]
    first_mean: float  # of users' coordinates along the first direction
    first_deviation: float
    shared: float  # ‖mean‖² over the mean of ‖δ‖²: 1 where all users' vectors are one
    norm: float  # mean of ‖δ‖
    control_norm: float | None = None  # the same with random prefixes
    control_shared: float | None = None

    @property
    def strength(self) -> float:
        """|mean| of the first coordinate in its standard deviations."""
        return abs(self.first_mean) / max(self.first_deviation, np.finfo(np.float64).tiny)


def statistics_of(block: int, rows: Array, control: Array | None) -> tuple[BlockStatistics, Spectrum]:
    """Of one block's vectors (N, d), and the spectrum as it is."""
    plain, centred = spectrum(rows), spectrum(rows, centred=True)
    first = coordinates(rows, plain.directions[:1])[:, 0]
    norm, shared = _lengths(rows, plain.mean)
    beside = (None, None) if control is None else _lengths(control)
    statistics = BlockStatistics(
        block,
        _ranks(plain, SHARES),
        _ranks(centred, SHARES),
        float(first.mean()),
        float(first.std()),
        shared,
        norm,
        *beside,
    )
    return statistics, plain


def _ranks(found: Spectrum, shares: Sequence[float]) -> dict[str, int]:
    return {str(share): found.rank(share) for share in shares}


def _lengths(rows: Array, mean: Doubles | None = None) -> tuple[float, float]:
    """(mean norm, squared norm of the mean over the mean squared norm)."""
    if mean is None:
        mean = sum((chunk.sum(0) for chunk in _chunks(rows)), np.zeros(rows.shape[1])) / len(rows)
    squares = np.concatenate([(chunk**2).sum(1) for chunk in _chunks(rows)])
    return float(np.sqrt(squares).mean()), float(mean @ mean / max(squares.mean(), np.finfo(float).tiny))


def _chunks(rows: Array | Doubles) -> Iterator[Doubles]:
    for at in range(0, len(rows), _CHUNK):
        yield np.asarray(rows[at : at + _CHUNK], np.float64)
