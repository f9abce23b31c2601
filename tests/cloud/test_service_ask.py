"""Ask over real TLS: many answers, one shift, one stream."""

from __future__ import annotations

import itertools
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from tests.cloud.doubles import Held
from tests.cloud.serving import BASE, INVALID, TIMEOUT, Device, Running, failure, generate, personal

from perfit_cloud.engine.generation.continuous import GenerationEngine
from perfit_cloud.model.artefacts import Artefact
from perfit_shared.wire import personalization_pb2 as pb

TEXTS = ["the cat sat", "on the mat", "and the dog", "ran to the door", "the mat", "the dog sat on the cat"]


def question(number: int, text: str = "the cat sat", **sampling: Any) -> pb.AskRequest:
    sampling = {"max_new_tokens": 12, **sampling}
    return pb.AskRequest(
        question=pb.Question(number=number, prompt=pb.Prompt(text=text), sampling=pb.Sampling(**sampling))
    )


def opening(shift: pb.Shift = BASE) -> pb.AskRequest:
    return pb.AskRequest(shift=shift)


class Stream:
    """An Ask call whose questions are sent when the test says so."""

    def __init__(self, device: Device, *first: pb.AskRequest, timeout: float = TIMEOUT) -> None:
        self._outbox: queue.SimpleQueue[pb.AskRequest | None] = queue.SimpleQueue()
        self.send(*first)
        self.call = device.stub.Ask(iter(self._outbox.get, None), timeout=timeout)

    def send(self, *requests: pb.AskRequest) -> None:
        for request in requests:
            self._outbox.put(request)

    def end(self) -> None:
        self._outbox.put(None)

    def next(self) -> pb.AskResponse:
        response: pb.AskResponse = next(self.call)
        return response


def ask(device: Device, *requests: pb.AskRequest) -> list[pb.AskResponse]:
    """All responses to a stream of these."""
    return list(device.stub.Ask(iter(requests), timeout=TIMEOUT))


def texts_of(responses: Sequence[pb.AskResponse]) -> dict[int, str]:
    texts: dict[int, str] = {}
    for response in responses:
        texts[response.number] = texts.get(response.number, "") + response.part.text
    return texts


def failures_of(responses: Sequence[pb.AskResponse]) -> dict[int, pb.Failure]:
    return {r.number: r.failure for r in responses if r.WhichOneof("body") == "failure"}


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.01)


def ask_threads() -> int:
    return sum(thread.name.startswith("perfit-ask") for thread in threading.enumerate())


@pytest.fixture(autouse=True)
def nothing_stays() -> Iterator[None]:
    """However a stream ended, its threads end."""
    yield
    until(lambda: ask_threads() == 0)


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
    until(lambda: generation.health().in_flight == 0)


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
    until(lambda: generation.health().in_flight == 0)
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
    until(lambda: len(engine.answers) == 2)
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
    until(lambda: len(engine.answers) == 3)
    if how == "cancel":
        stream.call.cancel()
    elif how == "revoked":
        running.authority.revoke(device.identity)
        engine.answers[0].step()
        assert failure(stream.next)[1] == {"perfit-code": "identity_revoked"}
    until(lambda: engine.running == 0)
    stream.end()
    again = Stream(running.device(), opening(), *(question(n) for n in range(3)))
    until(lambda: engine.running == 3)  # all places are free
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
    until(lambda: ask_threads() == 0)  # the server knows
    go.set()
    until(lambda: generation.health().in_flight == 0)
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
            until(lambda: engine.running == 1)
            stream.call.cancel()
            until(lambda: engine.running == 0)
            stream.end()
        until(lambda: ask_threads() == 0)
    assert "failed" not in caplog.text
