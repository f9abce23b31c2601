"""The loop that stage 2 is timed against computes what ours computes, so that only the work differs."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from tests.support.models import random_shift

from bench.reference import Reference, make_batch, train
from perfit_cloud.engine.gradients.stateless import GradientEngine
from perfit_cloud.engine.interface import ShiftUse
from perfit_cloud.model.artefacts import Artefact
from perfit_cloud.model.base import BaseModel
from perfit_shared.positions import Positions
from perfit_shared.training import Schedule
from perfit_shared.types import Mode

RANK = 3


def examples(count: int) -> list[tuple[list[int], list[int]]]:
    rng = np.random.default_rng(4)
    return [
        (
            rng.integers(3, 250, rng.integers(2, 30)).tolist(),
            rng.integers(3, 250, rng.integers(1, 6)).tolist(),
        )
        for _ in range(count)
    ]


@pytest.mark.parametrize("positions", ["f3+l3", "l1"])
def test_first_step_is_that_of_the_engine(
    load: Callable[[str], BaseModel], make_artefact: Callable[..., Artefact], positions: str
) -> None:
    base, pairs = load("llama"), examples(6)
    artefact = make_artefact(base, positions=positions)
    start = random_shift(artefact.spec, RANK, seed=5)
    engine = GradientEngine(base)
    ours = engine.gradient(pairs, ShiftUse(Mode.PERSONAL, artefact, start))
    engine.close()
    reference = Reference(base, artefact.collective, start)
    for layer, module in reference.personal.items():
        assert all(np.array_equal(a, b) for a, b in zip(module.tensors(), start.layers[layer], strict=True))
    with torch.enable_grad():
        loss = reference.loss(make_batch(pairs, Positions.parse(positions), base.device))
        loss.backward()
    reference.close()
    assert loss.item() == pytest.approx(ours.loss, rel=1e-5)
    for layer, module in reference.personal.items():
        mine = ours.tensors.layers[layer]
        for parameter, gradient in ((module.source.weight, mine.source), (module.source.bias, mine.bias)):
            assert parameter.grad is not None
            assert np.abs(parameter.grad.numpy() - gradient).max() <= 1e-5 * np.abs(gradient).max()


def test_it_learns_and_leaves_the_model_as_it_was(
    load: Callable[[str], BaseModel], make_artefact: Callable[..., Artefact]
) -> None:
    base, pairs = load("llama"), examples(8)
    artefact = make_artefact(base)
    hooks = [len(module._forward_hooks) for module in base.model.modules()]
    tensors, seconds = train(
        base,
        pairs,
        spec=artefact.spec,
        collective=artefact.collective,
        start=artefact.seed,
        schedule=Schedule(8, 2e-2, 4, 0, 8),
    )
    assert seconds > 0
    assert [len(module._forward_hooks) for module in base.model.modules()] == hooks
    tensors.check(artefact.spec, RANK)
    moved = [
        np.abs(a - b).max() for (_, a), (_, b) in zip(tensors.named(), artefact.seed.named(), strict=True)
    ]
    assert min(moved) > 1e-3  # rotations too
    engine = GradientEngine(base)
    before, after = (
        engine.gradient(pairs, ShiftUse(Mode.PERSONAL, artefact, personal)).loss
        for personal in (artefact.seed, tensors)
    )
    engine.close()
    assert after < 0.95 * before
