"""What holds for every family, whichever engine serves it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.cloud.asked import NEW, alone, prompts, uses
from tests.conftest import FAMILIES

from perfit_cloud.engine.batched import generate_batch
from perfit_cloud.engine.types import Mode, Sampling, ShiftUse
from perfit_cloud.model.base import BaseModel, block_list


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
