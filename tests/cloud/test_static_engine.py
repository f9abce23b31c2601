"""Batched `generate` with shifts gives the answers of the serving engine and of one request alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support.models import FAMILIES, random_shift

from perfit_cloud.engine.generation.continuous import GenerationEngine, GenerationSettings
from perfit_cloud.engine.generation.static import generate_batch
from perfit_cloud.engine.interface import Mode, Sampling, ShiftUse
from perfit_cloud.model.base import load_base
from perfit_shared.errors import InvalidInput, InvalidPrompt

NEW = 12


def prompts(count: int, vocabulary: int = 250) -> list[list[int]]:
    rng = np.random.default_rng(5)
    lengths = [1, 2, 3, 5, 8, 13, 30, 50]
    return [[0, *rng.integers(3, vocabulary, lengths[i % 8] - 1).tolist()] for i in range(count)]


def uses(artefacts: list[Any], count: int) -> list[ShiftUse]:
    """BASE, COLLECTIVE and PERSONAL in turn, over both artefacts, every person another."""
    out = []
    for i in range(count):
        artefact, mode = artefacts[i % 2], list(Mode)[i % 3]
        personal = random_shift(artefact.spec, artefact.spec.personal_rank, 100 + i)
        out.append(
            ShiftUse(
                mode, artefact if mode is not Mode.BASE else None, personal if mode is Mode.PERSONAL else None
            )
        )
    return out


def served(base: Any, artefacts: list[Any], wanted: list[tuple[list[int], ShiftUse, Sampling]]) -> list[str]:
    engine = GenerationEngine(
        base, {a.name: a for a in artefacts}, GenerationSettings(cache_tokens=4096, max_requests=32)
    )
    engine.start()
    try:
        answers = [engine.submit(*request) for request in wanted]
        return ["".join(piece.text for piece in answer) for answer in answers]
    finally:
        engine.stop()


@pytest.fixture(params=[family for family in FAMILIES if family != "falcon"])
def family(request: pytest.FixtureRequest, load: Any, make_artefact: Any) -> Any:
    base = load(request.param)
    other = make_artefact(base, "chat", positions="l4", layers=(0, 2, 3), seed=9, ranks=(4, 5))
    return base, [make_artefact(base), other]


def test_answers_equal_those_of_the_serving_engine(family: Any) -> None:
    base, artefacts = family
    wanted = [(p, u, Sampling(NEW)) for p, u in zip(prompts(16), uses(artefacts, 16), strict=True)]
    texts = generate_batch(base, *map(list, zip(*wanted, strict=True)))
    assert texts == served(base, artefacts, wanted)
    alone = [generate_batch(base, [p], [u], [s])[0] for p, u, s in wanted[::5]]
    assert texts[::5] == alone
    plain = generate_batch(base, [p for p, _, _ in wanted], [ShiftUse(Mode.BASE)] * 16, [Sampling(NEW)] * 16)
    assert sum(a != b for a, b in zip(texts, plain, strict=True)) >= 5  # the shifts are on
    for text, alike, (_, use, _) in zip(texts, plain, wanted, strict=True):
        assert use.mode is not Mode.BASE or text == alike


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
    assert texts == served(base, artefacts, [(prompt, use, s) for s in samplings])
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
def test_newslm_answers_equal_those_of_the_serving_engine(brief: Path, make_artefact: Any) -> None:
    base = load_base(str(brief / "models" / "newslm"))
    artefacts = [
        make_artefact(base, layers=(2, 3), positions="f7+l7", ranks=(8, 4)),
        make_artefact(base, "chat", layers=(4,), positions="l7", ranks=(8, 4)),
    ]
    wanted = [(p, u, Sampling(NEW)) for p, u in zip(prompts(12, 8000), uses(artefacts, 12), strict=True)]
    texts = generate_batch(base, *map(list, zip(*wanted, strict=True)))
    assert texts == served(base, artefacts, wanted)
