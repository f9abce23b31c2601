"""Ask over real TLS: many answers, one shift, one stream."""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Callable
from typing import Any

import pytest
from tests.support.ask_calls import Stream, ask, ask_threads, failures_of, opening, question, texts_of
from tests.support.cloud import INVALID, TIMEOUT, Running, failure, generate, personal
from tests.support.doubles import Held
from tests.support.waiting import wait_for

from perfit_cloud.engine.generation.continuous import GenerationEngine
from perfit_cloud.model.artefacts import Artefact
from perfit_shared.wire import personalization_pb2 as pb

TEXTS = ["the cat sat", "on the mat", "and the dog", "ran to the door", "the mat", "the dog sat on the cat"]


pytestmark = pytest.mark.usefixtures("no_ask_threads_stay")


# -- answers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.9, "seed": 7}])
def test_many_answers_equal_single_ones(
    run: Callable[..., Running], artefact: Artefact, sampling: dict[str, Any]
) -> None:
    device = run().device()
    shift, use = personal(artefact)
    assert use.personal is not None
    shift.personal = use.personal.to_bytes(dtype="int8")
    alone = {
        n: "".join(p.text for p in device.stub.Generate(generate(text, shift, **sampling), timeout=TIMEOUT))
        for n, text in enumerate(TEXTS)
    }
    questions = [question(n, text, **sampling) for n, text in enumerate(TEXTS)]
    responses = ask(device, opening(shift), *questions)
    assert texts_of(responses) == alone
    assert len(set(alone.values())) > 3, "answers that are all alike would show nothing"
    ends = [r.number for r in responses if r.part.finish]
    assert sorted(ends) == list(range(len(TEXTS))), "each ends once"
    assert texts_of(ask(device, opening(), *questions)) != alone, "base answers otherwise"
    assert not failures_of(responses)


def test_more_questions_than_slots_and_a_conversation(run: Callable[..., Running]) -> None:
    device = run(questions=2).device()
    responses = ask(device, opening(), *(question(n, TEXTS[n % 6]) for n in range(15)))
    assert sorted(texts_of(responses)) == list(range(15))
    stream = Stream(device, opening())
    for _ in range(3):  # a number is free again when its answer has come
        stream.send(question(4))
        while not stream.next().part.finish:
            pass
    stream.end()
    assert list(stream.call) == []
    assert ask(device, opening()) == []


# -- what is refused -----------------------------------------------------------------------------


def test_a_bad_question_fails_alone(run: Callable[..., Running], generation: GenerationEngine) -> None:
    device = run().device()
    responses = ask(
        device,
        opening(),
        question(1),
        question(2, "cat " * 300),
        question(3, max_new_tokens=0),
        question(4, ""),
        question(5),
    )
    told = failures_of(responses)
    assert {n: f.code for n, f in told.items()} == {
        2: "invalid_prompt",
        3: "invalid_input",
        4: "invalid_prompt",
    }
    assert "at most" in told[2].message
    assert {r.number for r in responses if r.part.finish} == {1, 5}
    wait_for(lambda: generation.health().in_flight == 0)


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([], "first message"),
        ([pb.AskRequest()], "first message"),
        ([question(1)], "first message"),
        ([opening(), opening()], "every message after"),
        ([opening(), pb.AskRequest()], "every message after"),
        ([opening(pb.Shift())], "mode"),
        ([opening(), question(1, max_new_tokens=60), question(1)], "number of one that still waits"),
    ],
)
def test_messages_out_of_order(
    run: Callable[..., Running], generation: GenerationEngine, messages: list[pb.AskRequest], says: str
) -> None:
    device = run().device()
    status, metadata, details = failure(lambda: ask(device, *messages))
    assert (status, metadata) == (INVALID, {"perfit-code": "invalid_input"})
    assert says in details
    wait_for(lambda: generation.health().in_flight == 0)
    assert len(texts_of(ask(device, opening(), question(1)))) == 1, "the server is well"


def test_tensors_that_cannot_be(run: Callable[..., Running], artefact: Artefact) -> None:
    device = run().device()
    shift, _ = personal(artefact)
    shift.personal = shift.personal[:-8]
    status, metadata, _ = failure(lambda: ask(device, opening(shift), question(1)))
    assert (status, metadata) == (INVALID, {"perfit-code": "invalid_tensors"})


# -- side by side, and leaving ---------------------------------------------------------------------


def test_answers_interleave(run: Callable[..., Running]) -> None:
    engine = Held()
    stream = Stream(run(engine=engine).device(), opening(), question(1), question(2))
    wait_for(lambda: len(engine.answers) == 2)
    seen = []
    for turn in (0, 1, 0, 1):
        engine.answers[turn].step()
        seen.append(stream.next().number)
    assert seen[0] != seen[1] and seen[:2] == seen[2:]
    for answer in engine.answers:
        answer.finish()
    stream.end()
    assert len(list(stream.call)) == 2


@pytest.mark.parametrize("how", ["cancel", "deadline", "revoked"])
def test_leaving_ends_every_answer_at_once(run: Callable[..., Running], how: str) -> None:
    engine = Held()
    running = run(engine=engine, streams=3)
    device = running.device()
    device.describe()  # the connection stands
    stream = Stream(
        device, opening(), *(question(n) for n in range(3)), timeout=5 if how == "deadline" else TIMEOUT
    )
    wait_for(lambda: len(engine.answers) == 3)
    if how == "cancel":
        stream.call.cancel()
    elif how == "revoked":
        running.authority.revoke(device.identity)
        engine.answers[0].step()
        assert failure(stream.next)[1] == {"perfit-code": "identity_revoked"}
    wait_for(lambda: engine.running == 0)
    stream.end()
    again = Stream(running.device(), opening(), *(question(n) for n in range(3)))
    wait_for(lambda: engine.running == 3)  # all places are free
    for answer in engine.answers[3:]:
        answer.finish()
    again.end()
    assert not failures_of(list(again.call))


def test_leaving_frees_the_real_engine(
    run: Callable[..., Running], generation: GenerationEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    device, go, made, forward = run().device(), threading.Event(), itertools.count(1), generation._forward

    def held(plan: Any) -> Any:
        if next(made) == 20:
            assert go.wait(TIMEOUT)
        return forward(plan)

    monkeypatch.setattr(generation, "_forward", held)
    stream = Stream(device, opening(), *(question(n, max_new_tokens=200) for n in range(4)))
    stream.next()
    assert generation.health().in_flight > 0
    stream.call.cancel()
    stream.end()
    wait_for(lambda: ask_threads() == 0)  # the server knows
    go.set()
    wait_for(lambda: generation.health().in_flight == 0)
    assert next(made) < 100, "it went on for somebody who had left"
    assert len(texts_of(ask(device, opening(), question(1)))) == 1


# -- errors nobody foresaw -------------------------------------------------------------------------


def test_unknown_errors_tell_nothing(run: Callable[..., Running], caplog: pytest.LogCaptureFixture) -> None:
    class Broken:
        continuous = True

        def submit(self, *_: object) -> Any:
            raise ZeroDivisionError("zebracanary")

    with caplog.at_level(logging.INFO):
        (response,) = ask(run(engine=Broken()).device(), opening(), question(3))
    assert (response.number, response.failure.code) == (3, "internal")
    assert response.failure.message == "internal error"
    assert "Ask failed: ZeroDivisionError at" in caplog.text
    assert "zebracanary" not in caplog.text


def test_leaving_logs_nothing(run: Callable[..., Running], caplog: pytest.LogCaptureFixture) -> None:
    """gRPC tells the thread that reads the questions by an error that none of ours is."""
    engine = Held()
    device = run(engine=engine).device()
    with caplog.at_level(logging.INFO):
        for _ in range(5):
            stream = Stream(device, opening(), question(0))
            wait_for(lambda: engine.running == 1)
            stream.call.cancel()
            wait_for(lambda: engine.running == 0)
            stream.end()
        wait_for(lambda: ask_threads() == 0)
    assert "failed" not in caplog.text
