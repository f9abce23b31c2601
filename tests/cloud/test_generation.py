"""The engines that answer: who waits, who leaves, what fails, how text comes out."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
from tests.support.generation import NEW, SMALL, alone, prompts, serve, uses
from tests.support.models import random_shift
from tests.support.waiting import wait_for

from perfit_cloud.engine.generation.continuous import GenerationEngine, GenerationSettings, can_share
from perfit_cloud.engine.gradients.stateless import GradientEngine
from perfit_cloud.engine.interface import Finish, Mode, Sampling, ShiftUse
from perfit_cloud.model.base import BaseModel
from perfit_shared.errors import Busy, InvalidPrompt, Unavailable


def test_who_shares_a_batch(family: Any) -> None:
    """Falcon's attention does not go through the library's interface; it is served all the same."""
    base, _, engine = family
    assert engine.continuous == (base.model.config.model_type != "falcon")


def test_who_finds_no_room_waits_and_gets_the_same_answer(load: Any, make_artefact: Any) -> None:
    base = load("llama")
    artefacts = {"news_headline": make_artefact(base)}
    engine = GenerationEngine(base, artefacts, GenerationSettings(320, 64, 16))
    use = ShiftUse(
        Mode.PERSONAL, artefacts["news_headline"], random_shift(artefacts["news_headline"].spec, 3, 5)
    )
    wanted = [(p, use, Sampling(40)) for p in prompts(12)]
    together, forward = [], engine._forward

    def counting(plan: Any) -> Any:
        together.append(len(engine._places))
        return forward(plan)

    engine._forward = counting  # type: ignore[method-assign]
    try:
        served = serve(engine, wanted)
    finally:
        engine.stop()
    assert 1 < max(together) < 12
    for (prompt, _, _), got in zip(wanted, served, strict=True):
        assert got == alone(base, prompt, use, 40)


def test_a_long_prompt_and_short_ones_keep_nobody_waiting(load: Any) -> None:
    """A short prompt that comes behind a long one speaks first; the long one goes on all the while."""
    base = load("llama")
    engine = GenerationEngine(base, {}, GenerationSettings(2048, 16, 16))
    first: list[str] = []
    forward = engine._forward

    def noting(plan: Any) -> Any:
        logits, sampled = forward(plan)
        first.extend(
            name
            for name, answer in names.items()
            if any(r.answer is answer for r in sampled) and name not in first
        )
        return logits, sampled

    engine._forward = noting  # type: ignore[method-assign]
    long, short = [0] * 240, [0, 5, 6, 7]
    with engine._changed:
        names = {"long": engine.submit(long, ShiftUse(Mode.BASE), Sampling(2))}
        names |= {f"short{i}": engine.submit(short, ShiftUse(Mode.BASE), Sampling(2)) for i in range(12)}
    try:
        for answer in names.values():
            list(answer)
    finally:
        engine.stop()
    assert first.index("long") == len(first) - 1
    assert len(first) == 13


def test_coming_and_leaving_leaves_nothing_behind(load: Any) -> None:
    """A thousand who come and go, behind others that read nothing of their answers: no place stays taken."""
    base = load("llama")
    engine = GenerationEngine(base, {}, GenerationSettings(512, 64, 8))
    hot = Sampling(60, temperature=2.0)
    try:
        slow = [engine.submit([0, 5, 6], ShiftUse(Mode.BASE), hot) for _ in range(4)]
        for _ in range(1000):
            engine.submit([0] * 100, ShiftUse(Mode.BASE), Sampling(100)).cancel()
            assert len(engine._waiting) <= 8 and engine.in_flight <= 8
        assert serve(engine, [([0, 5, 6], ShiftUse(Mode.BASE), Sampling(4))])[0] == alone(
            base, [0, 5, 6], ShiftUse(Mode.BASE), 4
        )
        assert all(list(answer)[-1].finish for answer in slow)  # made meanwhile, and kept for them
        assert engine.in_flight == 0 and not engine._places
    finally:
        engine.stop()
    assert not any(shelf.places for shelf in engine._kv_cache._kv_cache.values())


def test_what_a_request_held_goes_with_it(load: Any, make_artefact: Any) -> None:
    """Not at some later collection of cycles: on an idle cloud that may be hours away."""
    base = load("llama")
    artefact = make_artefact(base)
    engine = GenerationEngine(base, {artefact.name: artefact}, SMALL)
    use = ShiftUse(Mode.PERSONAL, artefact, random_shift(artefact.spec, 3, 1))
    gc.collect()
    gc.disable()
    try:
        answers = [engine.submit([0, 5, 6, 7], use, Sampling(n)) for n in (3, 200)]
        held = [weakref.ref(request) for request in engine._requests]
        held += [weakref.ref(t) for r in engine._requests for phi in r.personal.values() for t in phi]
        list(answers[0])
        next(answers[1])
        answers[1].cancel()
        assert len(held) == 14
        wait_for(lambda: all(ref() is None for ref in held), what="all is let go of")
    finally:
        gc.enable()
        engine.stop()


def test_an_engine_that_cannot_forget_stops(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """After an error of the device itself nothing works any more: readers and callers must hear of it."""
    engine = GenerationEngine(load("llama"), {}, SMALL)

    def broken(*_: Any) -> Any:
        raise RuntimeError("device-side assert")

    monkeypatch.setattr(engine, "_forward", broken)
    monkeypatch.setattr(engine._kv_cache, "clear", broken)
    with pytest.raises(Unavailable):
        list(engine.submit([0, 5, 6], ShiftUse(Mode.BASE), Sampling(4)))
    assert engine._thread is not None
    engine._thread.join(30)
    with pytest.raises(Unavailable):
        engine.submit([0, 5, 6], ShiftUse(Mode.BASE), Sampling(4))


@pytest.mark.parametrize("window", [10, 200])
@pytest.mark.parametrize("kind", ["qwen2_moe", "phimoe"])
def test_a_family_that_hides_its_window_in_the_mask_is_not_packed(kind: str, window: int) -> None:
    """Such a block does not tell its attention of it, which would look back over everything.

    The trial itself shows a window of 10; one of 200 is longer than its prompts.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        kind,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=100,
        max_position_embeddings=256,
        sliding_window=window,
        use_sliding_window=True,
        max_window_layers=2,
        initializer_range=0.3,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    assert not can_share(BaseModel("tiny", "", model, None))


def test_a_token_beyond_the_vocabulary_is_refused(load: Any) -> None:
    """In a shared pass it would end everybody's answers."""
    engine = GenerationEngine(load("llama"), {}, SMALL)
    with pytest.raises(InvalidPrompt, match="does not know"):
        engine.submit([0, 10**6], ShiftUse(Mode.BASE), Sampling(4))


def test_an_error_in_a_pass_ends_its_answers_and_the_engine_goes_on(load: Any) -> None:
    base = load("llama")
    engine = GenerationEngine(base, {}, SMALL)
    forward = engine._forward

    def failing(plan: Any) -> Any:
        engine._forward = forward  # type: ignore[method-assign]
        raise RuntimeError("secret")

    engine._forward = failing  # type: ignore[method-assign]
    try:
        with pytest.raises(Unavailable) as caught:
            list(engine.submit([0, 5, 6], ShiftUse(Mode.BASE), Sampling(4)))
        assert "secret" not in str(caught.value)
        assert engine.in_flight == 0
        assert serve(engine, [([0, 5, 6], ShiftUse(Mode.BASE), Sampling(4))])[0] == alone(
            base, [0, 5, 6], ShiftUse(Mode.BASE), 4
        )
    finally:
        engine.stop()


def test_text_comes_as_the_whole_answer_reads(family: Any) -> None:
    """Piece by piece, characters of several tokens and spaces in front of words included."""
    base, artefacts, engine = family
    for seed, use in enumerate(uses(artefacts, 6)):
        answer = engine.submit(prompts(8)[6], use, Sampling(40, temperature=3.0, seed=seed))
        text = "".join(piece.text for piece in answer)
        ids = answer.ids[:-1] if answer.ids[-1] in engine.end_ids else answer.ids
        assert text == base.decode(ids)


def test_the_order_of_the_engines_does_not_matter(load: Any, make_artefact: Any) -> None:
    base = load("llama")
    artefacts = {"news_headline": make_artefact(base)}
    gradients = GradientEngine(base)  # its hooks must not be copied into the serving twin
    engine = GenerationEngine(base, artefacts, SMALL)
    use = uses(artefacts | {"again": artefacts["news_headline"]}, 3)[2]
    try:
        assert serve(engine, [(prompts(7)[6], use, Sampling(NEW))])[0] == alone(base, prompts(7)[6], use)
    finally:
        engine.stop()
        gradients.close()


def test_a_stopped_engine_stays_stopped(load: Any) -> None:
    engine = GenerationEngine(load("llama"), {}, SMALL)
    answer = engine.submit([0, 5, 6], ShiftUse(Mode.BASE), Sampling(200))
    next(answer)
    engine.stop()
    with pytest.raises(Unavailable):
        list(answer)
    with pytest.raises(Unavailable):
        engine.submit([0, 5], ShiftUse(Mode.BASE), Sampling(2))


def test_sampling_is_per_request(family: Any) -> None:
    base, artefacts, engine = family
    prompt = prompts(8)[6]
    use = uses(artefacts, 3)[1]
    hot = Sampling(NEW, temperature=1.5, top_k=50, top_p=0.95, seed=7)
    crowd = [(prompt, use, Sampling(NEW, temperature=1.5, seed=i)) for i in range(6)]
    first = serve(engine, [(prompt, use, hot), (prompt, use, Sampling(NEW)), *crowd])
    again = serve(engine, [(prompt, use, Sampling(NEW)), (prompt, use, hot)])
    assert first[0] == again[1]  # my seed, whoever is beside me
    assert first[1] == again[0] == alone(base, prompt, use)  # greedy neighbours stay greedy
    assert len({tuple(ids) for ids in first[2:]}) > 1
    assert serve(engine, [(prompt, use, Sampling(NEW, temperature=5.0, top_k=1, seed=3))])[0] == again[0]


def test_stop_texts_and_cancel(family: Any) -> None:
    base, artefacts, engine = family
    prompt, use = prompts(8)[7], uses(artefacts, 3)[2]
    whole = base.decode(alone(base, prompt, use, 24))
    stop = whole[len(whole) // 2 : len(whole) // 2 + 2]
    pieces = list(engine.submit(prompt, use, Sampling(24, stop=(stop,))))
    assert "".join(p.text for p in pieces) == whole[: whole.index(stop)]
    assert pieces[-1].finish is Finish.END
    answer = engine.submit(prompt, use, Sampling(150, temperature=2.0))
    next(answer)
    answer.cancel()
    assert list(answer) == []
    assert engine.in_flight == 0


def test_limits(family: Any) -> None:
    base, _, engine = family
    with pytest.raises(InvalidPrompt, match="tokens"):
        engine.submit([5] * 300, ShiftUse(Mode.BASE), Sampling(10))
    waiting = [engine.submit([0, 5, 6], ShiftUse(Mode.BASE), Sampling(100)) for _ in range(16)]
    with pytest.raises(Busy) as busy:
        engine.submit([0, 5], ShiftUse(Mode.BASE), Sampling(5))
    assert busy.value.retry_ms > 0
    for answer in waiting:
        answer.cancel()
    assert serve(engine, [([0, 5, 6], ShiftUse(Mode.BASE), Sampling(4))])[0] == alone(
        base, [0, 5, 6], ShiftUse(Mode.BASE), 4
    )
