"""A shift between two others."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from perfit_shared.mixes import between
from perfit_shared.optimizer import OptimizerConfig, StiefelAdamW
from perfit_shared.shifts import LayerShift, ShiftSpec, ShiftTensors

SPEC = ShiftSpec((3, 5), "l2", 4, 4, 32)
START = ShiftTensors.identity(SPEC, 4, 0)


def trained(steps: int) -> ShiftTensors:
    """From the start, by gradients that are much alike from step to step."""
    rng = np.random.default_rng(1)
    goal = {name: rng.standard_normal(array.shape) for name, array in START.named()}
    optimizer, tensors = StiefelAdamW(OptimizerConfig(2e-3, steps)), START
    for _ in range(steps):
        noisy = {name: of + 0.3 * rng.standard_normal(of.shape) for name, of in goal.items()}
        tensors = optimizer.step(tensors, ShiftTensors.from_named(noisy))  # type: ignore[arg-type]
    return tensors


def effect(of: LayerShift) -> npt.NDArray[np.float64]:
    """φ(x) − x = Rᵀ[C b] applied to (x, 1); (d, d + 1)."""
    inner = np.hstack([of.source - of.rotation, of.bias[:, None]]).astype(np.float64)
    return of.rotation.astype(np.float64).T @ inner


@pytest.mark.parametrize("share", [0.25, 0.75])
def test_it_is_near_to_the_mix_of_the_effects(share: float) -> None:
    end = trained(20)
    found = between(START, end, share)
    found.check(SPEC, 4)
    for layer, first in START.layers.items():
        whole = effect(end.layers[layer]) - effect(first)
        exact = effect(first) + share * whole
        off = np.linalg.norm(effect(found.layers[layer]) - exact) / np.linalg.norm(whole)
        assert off < 0.1
        assert np.linalg.norm(end.layers[layer].rotation - first.rotation) > 0.3, "or R would not matter"


def test_its_ends_are_the_two() -> None:
    end = trained(10)
    for share, wanted in ((0.0, START), (1.0, end)):
        for (_, ours), (_, theirs) in zip(between(START, end, share).named(), wanted.named(), strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-6)
