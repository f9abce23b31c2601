"""Batched `generate` for research: each prompt gets what it would get alone (test_families, too)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support.generation import NEW, prompts, uses
from tests.support.models import FAMILIES

from perfit_cloud.engine.generation.continuous import GenerationEngine
from perfit_cloud.engine.generation.static import generate_batch
from perfit_cloud.engine.interface import GenerationSettings, ShiftUse
from perfit_cloud.model.base import load_base
from perfit_shared.errors import InvalidInput, InvalidPrompt
from perfit_shared.types import Mode, Sampling


@pytest.fixture(params=[family for family in FAMILIES if family != "falcon"])
def family(request: pytest.FixtureRequest, load: Any, make_artefact: Any) -> Any:
    base = load(request.param)
    other = make_artefact(base, "chat", positions="l4", layers=(0, 2, 3), seed=9, ranks=(4, 5))
    return base, {artefact.name: artefact for artefact in (make_artefact(base), other)}


def test_every_request_has_its_own_length_stop_and_draws(family: Any) -> None:
    base, artefacts = family
    prompt, use = prompts(8)[7], uses(artefacts, 3)[2]
    whole = generate_batch(base, [prompt], [use], [Sampling(24)])[0]
    stop = whole[len(whole) // 2 : len(whole) // 2 + 2]
    hot = Sampling(20, temperature=1.5, top_k=50, top_p=0.95, seed=7)
    samplings = [
        Sampling(24),
        Sampling(3),
        Sampling(24, stop=("never this", stop)),
        hot,
        *(Sampling(20, temperature=1.5, seed=i) for i in range(4)),
    ]
    texts = generate_batch(base, [prompt] * 8, [use] * 8, samplings)
    assert texts[0] == whole
    assert texts[1] == generate_batch(base, [prompt], [use], [Sampling(3)])[0]
    cut = texts[1].rstrip("\ufffd")  # it may end within a character
    assert whole.startswith(cut) and len(cut) < len(whole)
    assert texts[2] == whole[: whole.index(stop)]
    assert texts[3] == generate_batch(base, [prompt], [use], [hot])[0]  # my seed, whoever is beside me
    assert len(set(texts[4:])) > 1


def test_nothing_stays_on_the_model(family: Any) -> None:
    base, artefacts = family
    asked = (prompts(6), uses(artefacts, 6), [Sampling(NEW)] * 6)
    hooks = [len(module._forward_hooks) for module in base.model.modules()]
    first = generate_batch(base, *asked)
    assert generate_batch(base, *asked) == first
    assert [len(module._forward_hooks) for module in base.model.modules()] == hooks


def test_what_a_model_folder_suggests_for_generation_is_not_used(family: Any) -> None:
    """The serving engine does not either."""
    base, artefacts = family
    opinionated = replace(base, model=base.share_weights())
    opinionated.model.generation_config.update(repetition_penalty=5.0, do_sample=True, temperature=9.0)
    asked = (prompts(6), uses(artefacts, 6), [Sampling(NEW)] * 6)
    assert generate_batch(opinionated, *asked) == generate_batch(base, *asked)


def test_a_long_prompt_beside_a_long_answer_stays_inside_the_context(load: Any) -> None:
    """In one batch the long prompt would be run on past the last position that GPT-2 has."""
    base = load("gpt2")
    long = [0, *np.random.default_rng(1).integers(3, 250, 239).tolist()]
    both = ([long, [0, 5, 6]], [ShiftUse(Mode.BASE)] * 2, [Sampling(8), Sampling(200)])
    alone = [generate_batch(base, *([x] for x in request))[0] for request in zip(*both, strict=True)]
    assert generate_batch(base, *both) == alone


def test_what_cannot_be_is_refused(load: Any) -> None:
    base, use = load("llama"), ShiftUse(Mode.BASE)
    assert generate_batch(base, [], [], []) == []
    with pytest.raises(InvalidPrompt, match="250 tokens"):
        generate_batch(base, [[5] * 250], [use], [Sampling(10)])
    with pytest.raises(InvalidPrompt):
        generate_batch(base, [[]], [use], [Sampling(10)])
    with pytest.raises(InvalidInput):
        generate_batch(base, [[5], [6]], [use], [Sampling(10)])


@pytest.mark.brief
def test_newslm_answers_equal_those_of_the_continuous_engine(brief: Path, make_artefact: Any) -> None:
    base = load_base(str(brief / "models" / "newslm"))
    artefacts = {
        "news_headline": make_artefact(base, layers=(2, 3), positions="f7+l7", ranks=(8, 4)),
        "chat": make_artefact(base, "chat", layers=(4,), positions="l7", ranks=(8, 4)),
    }
    asked = [prompts(12, 8000), uses(artefacts, 12), [Sampling(NEW)] * 12]
    engine = GenerationEngine(base, artefacts, GenerationSettings(cache_tokens=4096, max_requests=32))
    try:
        streams = [engine.submit(*request) for request in zip(*asked, strict=True)]
        served = ["".join(chunk.text for chunk in stream) for stream in streams]
    finally:
        engine.stop()
    assert generate_batch(base, *asked) == served
