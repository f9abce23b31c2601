"""Frequency and presence penalties: the formula, and that an answer's tokens are overwritten at its end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tests.support.engine_subject import PLAIN, SMALL, endless
from tests.support.waiting import wait_for

from perfit_cloud.engine.generation.continuous import GenerationEngine
from perfit_cloud.engine.generation.penalties import Penalties, penalize
from perfit_cloud.engine.generation.sampling import Sampler, draw
from perfit_cloud.engine.generation.static import BatchedEngine, generate_batch
from perfit_shared.errors import InvalidInput
from perfit_shared.types import Sampling

ASKED = Sampling(40, frequency_penalty=0.5, presence_penalty=0.25)
PROMPT = [0, 5, 6]


def test_a_logit_loses_its_count_and_its_presence() -> None:
    rng = np.random.default_rng(0)
    logits = torch.from_numpy(rng.standard_normal((3, 50)).astype(np.float32))
    answers = [rng.integers(0, 50, 40).tolist(), [], [7]]
    held = [Penalties(replace(ASKED, frequency_penalty=f)) for f in (0.5, 0.5, -1.0)]
    for of, answer in zip(held, answers, strict=True):
        for token in answer:
            of.add(token)
    want = logits.double().clone()
    for row, (answer, frequency) in enumerate(zip(answers, (0.5, 0.5, -1.0), strict=True)):
        for token in set(answer):
            want[row, token] -= answer.count(token) * frequency + 0.25
    plain = logits.clone()
    penalize(logits, [*held[:2], None])
    assert torch.equal(logits[1:], plain[1:])
    penalize(logits, [None, None, held[2]])
    assert torch.allclose(logits.double(), want, atol=1e-6)


def test_the_logits_of_the_model_stay_as_they_are() -> None:
    """Log-probabilities are of them, and half precision would round a penalty away."""
    logits = torch.full((2, 9), 100.0, dtype=torch.bfloat16)  # the next number below is 99.5
    logits[:, 4] = 101.0
    before, sampler = logits.clone(), Sampler.of(Sampling(9, frequency_penalty=0.4))
    drawn = [draw(logits, [sampler, None]) for _ in range(4)]
    assert [one for one, _ in drawn] == [4, 4, 4, 0]  # 101, 100.6, 100.2, then 99.8 is less than 100
    assert [other for _, other in drawn] == [4] * 4
    assert torch.equal(logits, before)


def test_who_asks_for_none_has_no_sampler() -> None:
    assert Sampler.of(Sampling(9)) is None
    hot = Sampler.of(Sampling(9, temperature=1.0))
    assert hot is not None and hot.penalties is None


@pytest.mark.parametrize("value", [2.01, -2.01, float("nan"), float("inf")])
def test_a_penalty_out_of_bounds_is_refused(value: float) -> None:
    for key in ("frequency_penalty", "presence_penalty"):
        with pytest.raises(InvalidInput, match="from -2 to 2"):
            Sampling(9, **{key: value})


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The arrays of all penalties, and the tokens that were put into them."""
    seen: list[Any] = []
    make, add = Penalties.__init__, Penalties.add

    def made(self: Penalties, sampling: Sampling) -> None:
        make(self, sampling)
        seen.append(([], self._ids, self._counts))

    def added(self: Penalties, token: int) -> None:
        add(self, token)
        next(tokens for tokens, ids, _ in seen if ids is self._ids).append(token)

    monkeypatch.setattr(Penalties, "__init__", made)
    monkeypatch.setattr(Penalties, "add", added)
    return seen


def is_overwritten(held: list[Any]) -> bool:
    assert held
    return all(not ids.any() and not counts.any() for _, ids, counts in held)


def read(stream: Any, _engine: Any) -> None:
    assert list(stream)[-1].finish


def cancel(stream: Any, _engine: Any) -> None:
    next(stream)
    stream.cancel()


def stop(stream: Any, engine: Any) -> None:
    next(stream)
    engine.stop()


@pytest.mark.parametrize("kind", [GenerationEngine, BatchedEngine])
@pytest.mark.parametrize("ending", [read, cancel, stop])
def test_the_tokens_of_an_answer_are_overwritten_at_its_end(
    kind: Any, ending: Callable[[Any, Any], None], load: Any, held: list[Any]
) -> None:
    engine = kind(endless(load("llama")), {}, SMALL)
    try:
        ending(engine.submit(PROMPT, PLAIN, replace(ASKED, max_new_tokens=200)), engine)
        wait_for(lambda: is_overwritten(held))
        assert held[0][0]
        wait_for(lambda: engine.health().in_flight == 0)
    finally:
        engine.stop()


@pytest.mark.parametrize("kind", [GenerationEngine, BatchedEngine])
def test_the_tokens_of_answers_that_failed_are_overwritten(
    kind: Any, load: Any, held: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, count = kind(endless(load("llama")), {}, SMALL), [0]
    embed = torch.nn.Embedding.forward

    def breaks(self: torch.nn.Embedding, ids: torch.Tensor) -> torch.Tensor:
        count[0] += 1
        if count[0] > 3:
            raise ZeroDivisionError
        return embed(self, ids)

    monkeypatch.setattr(torch.nn.Embedding, "forward", breaks)
    try:
        with pytest.raises(Exception, match="ask again"):
            list(engine.submit(PROMPT, PLAIN, ASKED))
        assert held[0][0]
        wait_for(lambda: is_overwritten(held))
    finally:
        engine.stop()


def test_research_overwrites_them_too(load: Any, held: list[Any]) -> None:
    assert generate_batch(endless(load("llama")), [PROMPT], [PLAIN], [ASKED])
    assert held[0][0] and is_overwritten(held)
