"""Examples as token ids, personal shifts, and gradients compared."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from perfit_cloud.engine.interface import Gradient
from perfit_shared.shifts import ShiftTensors
from tests.support.models import random_shift

PLENTY = 2**30
Pairs = list[tuple[list[int], list[int]]]


def make_pairs(lengths: list[int], seed: int = 0) -> Pairs:
    """One pair for each length of a prompt, with targets of 1 to 6 tokens."""
    rng = np.random.default_rng(seed)
    return [
        ([0, *rng.integers(3, 290, n - 1).tolist()], [*rng.integers(3, 290, i % 6).tolist(), 1])
        for i, n in enumerate(lengths)
    ]


RAGGED = make_pairs([13, 2, 50, 3, 1, 30, 5, 21])


def assert_equal(got: Gradient, wanted: Gradient, tolerance: float = 2e-5) -> None:
    assert got.tokens == wanted.tokens
    assert got.loss == pytest.approx(wanted.loss, rel=1e-5)
    assert wanted.tensors.norm() > 1e-3
    for (name, a), (_, b) in zip(got.tensors.named(), wanted.tensors.named(), strict=True):
        assert a.shape == b.shape
        assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b) + 1e-7, name


def person(artefact: Any, seed: int) -> ShiftTensors:
    return random_shift(artefact.spec, artefact.spec.personal_rank, seed)
