"""What holds for every family, whichever engine serves it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.support.generation import NEW, alone, prompts, uses
from tests.support.models import FAMILIES

from perfit_cloud.engine.generation.static import generate_batch
from perfit_cloud.engine.gradients.batch import make_batch, target_log_likelihoods
from perfit_cloud.engine.interface import ShiftUse
from perfit_cloud.model import forward
from perfit_cloud.model.base import BaseModel
from perfit_cloud.model.blocks import block_list, hidden_of, with_hidden
from perfit_shared.positions import Positions
from perfit_shared.types import Mode, Sampling


@pytest.fixture(params=FAMILIES)
def base(request: pytest.FixtureRequest, load: Any) -> BaseModel:
    loaded: BaseModel = load(request.param)
    return loaded


def test_batched_answers_equal_hooked_generate(base: BaseModel, make_artefact: Any) -> None:
    """Of one request at a time, with φ written out by hand."""
    artefacts = {
        "news_headline": make_artefact(base),
        "chat": make_artefact(base, "chat", positions="l4", layers=(0, 2, 3), seed=9, ranks=(4, 5)),
    }
    asked = list(zip(prompts(8), uses(artefacts, 8), strict=True))
    texts = generate_batch(base, *map(list, zip(*asked, strict=True)), [Sampling(NEW)] * 8)
    for (prompt, use), text in zip(asked, texts, strict=True):
        ids = alone(base, prompt, use)
        assert text == base.decode(ids[:-1] if ids[-1] in base.end_ids else ids), (use.mode, len(prompt))
    plain = [base.decode(alone(base, prompt, ShiftUse(Mode.BASE))) for prompt, _ in asked]
    assert sum(a != b for a, b in zip(texts, plain, strict=True)) >= 3  # the shifts are on


def test_the_model_is_a_good_witness(base: BaseModel) -> None:
    """Its first token moves the last logits; a context that changed nothing would let every test pass."""
    ids = torch.tensor([prompts(8)[5], prompts(8)[5]])
    ids[1, 0] = 40
    with torch.no_grad():
        logits = base.model(ids).logits[:, -1]
    assert base.blocks == len(block_list(base.model)) == 4
    assert (logits[0] - logits[1]).abs().max() > 1e-2


def test_losses_in_slices_are_the_losses(base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The head runs on a few rows at a time, and again in the backward pass; nothing else changes."""
    pairs = [(p, [5, 6, 7, 1]) for p in prompts(8)]
    batch = make_batch(pairs, Positions.parse("l1"), base.device)
    rows: list[int] = []
    head = base.model.get_output_embeddings()

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        hidden: list[torch.Tensor] = []
        handles = [
            block_list(base.model)[1].register_forward_hook(
                lambda _m, _a, out: (
                    hidden.append(hidden_of(out).detach().requires_grad_()) or with_hidden(out, hidden[0])
                )
            ),
            head.register_forward_hook(lambda _m, _a, out: rows.append(out.shape[1])),
        ]
        losses = -target_log_likelihoods(base, batch, [])
        (gradient,) = torch.autograd.grad(losses.sum(), hidden[0])
        for handle in handles:
            handle.remove()
        return losses.detach(), gradient

    whole, gradient = run()
    assert rows == [32]
    rows.clear()
    monkeypatch.setattr(forward, "_LOGITS", 1)
    monkeypatch.setattr(forward, "_LEAST_ROWS", 5)
    losses, same = run()
    assert max(rows) == 5 and len(rows) == 14
    torch.testing.assert_close(losses, whole, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(same, gradient, rtol=1e-6, atol=1e-6 * float(gradient.abs().max()))
