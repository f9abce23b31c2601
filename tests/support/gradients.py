"""Examples as token ids, personal shifts, and gradients compared."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from perfit_cloud.engine.gradients.stateless import GradientEngine
from perfit_cloud.engine.interface import Gradient, ShiftUse
from perfit_cloud.model.blocks import block_list, hidden_of, with_hidden
from perfit_shared.positions import Positions
from perfit_shared.shifts import LayerShift, ShiftTensors
from perfit_shared.types import Mode
from tests.support.models import random_shift

PLENTY = 2**30
Pairs = list[tuple[list[int], list[int]]]


def make_pairs(lengths: list[int], seed: int = 0, vocabulary: int = 290) -> Pairs:
    """One pair for each length of a prompt, with targets of 1 to 6 tokens."""
    rng = np.random.default_rng(seed)
    return [
        ([0, *rng.integers(3, vocabulary, n - 1).tolist()], [*rng.integers(3, vocabulary, i % 6).tolist(), 1])
        for i, n in enumerate(lengths)
    ]


_LENGTHS = [13, 2, 50, 3, 1, 30, 5, 21]
RAGGED = make_pairs(_LENGTHS)
OF_TOKENIZER = make_pairs(_LENGTHS, vocabulary=280)  # what `tiny_tokenizer` has


def assert_equal(got: Gradient, wanted: Gradient, tolerance: float = 2e-5) -> None:
    assert got.tokens == wanted.tokens
    assert got.loss == pytest.approx(wanted.loss, rel=1e-5)
    assert wanted.tensors.norm() > 1e-3
    for (name, a), (_, b) in zip(got.tensors.named(), wanted.tensors.named(), strict=True):
        assert a.shape == b.shape
        assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b) + 1e-7, name


def assert_right_in_half(base: Any, artefact: Any, pairs: Pairs) -> None:
    """The engine is about as near to the gradient in float32 as plain autograd in half precision is.

    Both round, each in an order of its own, so they differ from each other by up to the sum of their errors.
    """
    mine, wide = person(artefact, 3), replace(base, model=copy.deepcopy(base.model).float())
    engine = GradientEngine(base)
    try:
        got = engine.gradient(pairs, ShiftUse(Mode.PERSONAL, artefact, mine))
    finally:
        engine.close()
    assert {array.dtype for _, array in got.tensors.named()} == {np.dtype(np.float32)}
    alone, exact = (autograd(each, artefact, mine, pairs) for each in (base, wide))
    assert _off(got, alone) > 0, "or nothing was in half precision"
    assert _off(got, exact) < 1.5 * _off(alone, exact) < 0.5
    assert abs(got.loss - exact.loss) < 0.01 * exact.loss


def _off(found: Gradient, wanted: Gradient) -> float:
    """Share by which the tensor that differs most differs."""
    both = zip(found.tensors.named(), wanted.tensors.named(), strict=True)
    return max(float(np.linalg.norm(a - b) / np.linalg.norm(b)) for (_, a), (_, b) in both)


def person(artefact: Any, seed: int) -> ShiftTensors:
    return random_shift(artefact.spec, artefact.spec.personal_rank, seed)


def autograd(base: Any, artefact: Any, personal: ShiftTensors, pairs: Pairs) -> Gradient:
    """Through φ written by the formula, one example at a time, unpadded."""
    leaves = {
        layer: [torch.tensor(t).requires_grad_() for t in shift] for layer, shift in personal.layers.items()
    }
    loss = sum((_loss(base, artefact, leaves, *pair) for pair in pairs), torch.zeros(()))
    tokens = sum(len(target) for _, target in pairs)
    (loss / tokens).backward()
    found = {}
    for layer, three in leaves.items():
        found[layer] = LayerShift(*(leaf.grad.numpy() for leaf in three if leaf.grad is not None))
    return Gradient(float(loss.detach()) / tokens, tokens, ShiftTensors(found))


def _loss(base: Any, artefact: Any, leaves: Any, prompt: list[int], target: list[int]) -> torch.Tensor:
    positions = Positions.parse(artefact.spec.positions).indices(len(prompt))
    handles = []
    for layer in artefact.spec.layers:
        first = [torch.tensor(t) for t in artefact.collective.layers[layer]]

        def hook(_m: Any, _a: Any, output: Any, first: Any = first, layer: int = layer) -> Any:
            hidden = hidden_of(output)
            rows = list(hidden.unbind(1))
            for p in positions:
                row = rows[p].float()
                for r, w, b in (first, leaves[layer]):
                    row = row + (row @ w.T + b - row @ r.T) @ r
                rows[p] = row.to(hidden.dtype)
            return with_hidden(output, torch.stack(rows, 1))

        handles.append(block_list(base.model)[layer].register_forward_hook(hook))
    try:
        logits = base.model(torch.tensor([prompt + target])).logits[0, len(prompt) - 1 : -1]
    finally:
        for handle in handles:
            handle.remove()
    return torch.nn.functional.cross_entropy(logits.float(), torch.tensor(target), reduction="sum")
