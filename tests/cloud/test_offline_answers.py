"""Answers to prompts that are all known beforehand: what each would get alone, whoever shares its passes."""

from __future__ import annotations

from typing import Any

import pytest
from tests.support.generation import NEW, prompts, uses
from tests.support.models import FAMILIES

from perfit_cloud.engine.generation import offline
from perfit_cloud.engine.generation.continuous import GenerationEngine, can_share
from perfit_cloud.engine.generation.offline import generate_all
from perfit_cloud.engine.generation.static import generate_batch
from perfit_cloud.engine.interface import ShiftUse
from perfit_shared.errors import InvalidInput, InvalidPrompt
from perfit_shared.types import Mode, Sampling

PLAIN = ShiftUse(Mode.BASE)


def asked(
    base: Any, make_artefact: Any, count: int
) -> tuple[list[list[int]], list[ShiftUse], list[Sampling]]:
    other = make_artefact(base, "chat", positions="l4", layers=(0, 2, 3), seed=9, ranks=(4, 5))
    artefacts = {artefact.name: artefact for artefact in (make_artefact(base), other)}
    samplings = [Sampling(NEW) if i % 3 else Sampling(NEW, temperature=1.5, seed=i) for i in range(count)]
    return prompts(count), uses(artefacts, count), samplings


@pytest.mark.parametrize("family", FAMILIES)
def test_all_get_what_they_get_in_static_batches(family: str, load: Any, make_artefact: Any) -> None:
    base = load(family)
    request = asked(base, make_artefact, 10)
    assert generate_all(base, *request) == generate_batch(base, *request)


def test_more_prompts_than_go_on_at_once_are_taken_up_one_by_one(
    load: Any, make_artefact: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offline, "_AT_ONCE", 3)
    base, ended = load("llama"), list[int]()
    assert can_share(base)
    request = asked(base, make_artefact, 11)
    texts = generate_all(base, *request, done=ended.append)
    assert texts == generate_batch(base, *request)
    assert sum(ended) == 11
    assert max(ended) <= 3


def test_a_stop_text_ends_one_answer_and_no_other(load: Any) -> None:
    base, three = load("llama"), prompts(3)
    whole = generate_all(base, three, [PLAIN] * 3, [Sampling(24)] * 3)
    stop = whole[1][len(whole[1]) // 2 :][:2]
    stopped = generate_all(base, three, [PLAIN] * 3, [Sampling(24), Sampling(24, stop=(stop,)), Sampling(24)])
    assert stopped == [whole[0], whole[1][: whole[1].index(stop)], whole[2]]


def test_an_answer_that_a_stop_text_ended_takes_no_more_passes(
    load: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, prompt, rounds = load("llama"), prompts(8)[7], list[int]()
    inner = GenerationEngine._round
    monkeypatch.setattr(GenerationEngine, "_round", lambda engine: (rounds.append(1), inner(engine)))
    start = generate_all(base, [prompt], [PLAIN], [Sampling(8)])[0][:1]
    needed = len(rounds)
    assert generate_all(base, [prompt], [PLAIN], [Sampling(100, stop=(start,))]) == [""]
    assert len(rounds) - needed <= 8


def test_a_prompt_as_long_as_the_context_is_answered(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offline, "_CACHE_TOKENS", 64)
    base = load("llama")
    long = [5 + i % 90 for i in range(base.context - 4)]
    request = ([long, [5, 6]], [PLAIN] * 2, [Sampling(4)] * 2)
    assert generate_all(base, *request) == generate_batch(base, *request)


def test_what_cannot_be_is_refused_before_anything_is_answered(load: Any) -> None:
    base, ended = load("llama"), list[int]()
    assert generate_all(base, [], [], []) == []
    for bad in ([5] * base.context, [], [10**6]):
        with pytest.raises(InvalidPrompt):
            generate_all(base, [[5, 6], bad], [PLAIN] * 2, [Sampling(10)] * 2, done=ended.append)
    with pytest.raises(InvalidInput):
        generate_all(base, [[5], [6]], [PLAIN], [Sampling(10)])
    assert not ended


def test_two_artefacts_of_one_name_are_kept_apart(load: Any, make_artefact: Any) -> None:
    base = load("llama")
    both = [make_artefact(base, seed=seed) for seed in (1, 2)]
    request = ([prompts(8)[7]] * 2, [ShiftUse(Mode.COLLECTIVE, one) for one in both], [Sampling(NEW)] * 2)
    assert generate_all(base, *request) == generate_batch(base, *request)
    assert len({*generate_all(base, *request)}) == 2
