"""What a member can learn of the collective shift: all of it. The docs say so, and this is why.

With one shifted row the gradient of the personal shift is ∂loss/∂W = (R g) xᵀ and ∂loss/∂b = R g, where x is
the row that φ₁ gave; who has the base model knows the row h that went in. φ₁ is x = A h + c, so as many
calls as there are unknowns in a row of (A, c) solve for it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from perfit_cloud.engine.gradients.stateless import GradientEngine
from perfit_cloud.engine.interface import ShiftUse
from perfit_cloud.model.base import BaseModel
from perfit_cloud.model.blocks import block_list
from perfit_shared.types import Mode


def recovered(base: BaseModel, artefact: Any, layer: int, calls: int) -> float:
    """Relative error (Frobenius) of (A, c) after so many calls, each with one example of two tokens."""
    rng = np.random.default_rng(0)
    prompts = rng.integers(3, base.model.config.vocab_size, (calls, 2)).tolist()
    before, after = [], []
    engine = GradientEngine(base)
    try:
        for prompt in prompts:
            gradient = engine.gradient([(prompt, [5, 6])], ShiftUse(Mode.PERSONAL, artefact, artefact.seed))
            of = gradient.tensors.layers[layer]
            after.append(of.source.T.astype(float) @ of.bias / float(of.bias.astype(float) @ of.bias))
            before.append(_output(base, prompt, layer))
    finally:
        engine.close()
    known = np.column_stack([np.array(before), np.ones(calls)])  # (calls, d + 1)
    found = np.linalg.lstsq(known, np.array(after), rcond=None)[0].T  # (d, d + 1)
    phi = artefact.collective.layers[layer]
    turn, source = phi.rotation.astype(float), phi.source.astype(float)
    true = np.column_stack([np.eye(len(turn[0])) + turn.T @ (source - turn), turn.T @ phi.bias])
    identity = np.column_stack([np.eye(len(turn[0])), np.zeros(len(turn[0]))])
    return float(np.linalg.norm(found - true) / np.linalg.norm(true - identity))


def _output(base: BaseModel, prompt: list[int], layer: int) -> np.ndarray:
    """The last token's state behind a block of the untouched model."""
    seen: list[torch.Tensor] = []
    handle = block_list(base.model)[layer].register_forward_hook(
        lambda _m, _a, out: seen.append((out[0] if isinstance(out, tuple) else out)[0, -1].double())
    )
    try:
        with torch.no_grad():
            base.model(input_ids=torch.tensor([prompt]), use_cache=False)
    finally:
        handle.remove()
    return seen[0].numpy()


def test_gradient_calls_give_the_whole_collective_shift(base: BaseModel, make_artefact: Any) -> None:
    artefact = make_artefact(base, positions="l1", layers=(2,))
    assert recovered(base, artefact, 2, 3 * base.hidden_size) < 1e-3
