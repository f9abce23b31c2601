"""Bounds of Ask: places and shares of them, time, and callers who say nothing or read nothing."""

from __future__ import annotations

import time
from collections.abc import Callable

import grpc
import pytest
from tests.support.ask_calls import Stream, failures_of, opening, question
from tests.support.cloud import TIMEOUT, Device, Running, failure, generate
from tests.support.doubles import Held
from tests.support.waiting import wait_for

from perfit_cloud.service import interceptor as guard
from perfit_cloud.service import listeners
from perfit_cloud.service.streams import ask as ask_module
from perfit_shared.wire import personalization_pb2 as pb


def test_a_busy_cloud_turns_questions_away_not_the_stream(run: Callable[..., Running]) -> None:
    engine = Held()
    running = run(engine=engine, streams=2, retry_ms=70)
    stream = Stream(running.device(), opening(), *(question(n) for n in range(4)))
    turned_away = [stream.next() for _ in range(2)]
    for response in turned_away:
        assert (response.failure.code, response.failure.retry_ms) == ("busy", 70)
        assert "try again" in response.failure.message
    wait_for(lambda: len(engine.answers) == 2)
    assert failure(lambda: list(running.device().stub.Generate(generate())))[0] == "RESOURCE_EXHAUSTED"
    for answer in engine.answers:
        answer.finish()
    assert all(stream.next().part.finish for _ in range(2))
    stream.send(question(7))  # at once: whose answer is over has left its place
    wait_for(lambda: len(engine.answers) == 3)
    engine.answers[2].finish()
    assert stream.next().number == 7
    stream.end()


def test_no_more_questions_are_read_than_there_are_slots(run: Callable[..., Running]) -> None:
    """Nor when their answers are made and wait for a caller who reads slowly; others go on meanwhile."""
    engine = Held(piece="x" * 1_000_000)
    running = run(engine=engine, questions=3)
    stream = Stream(running.device(), opening(), *(question(n) for n in range(9)))
    wait_for(lambda: len(engine.answers) == 3)
    for answer in engine.answers:
        for _ in range(15):  # more than all buffers on the way take
            answer.step()
        answer.finish()
    other = Stream(running.device(), opening(), question(0))
    wait_for(lambda: len(engine.answers) == 4)
    engine.answers[3].step()
    assert other.next().number == 0, "the slow caller held up another one"
    engine.answers[3].finish()
    other.end()
    assert other.next().part.finish
    time.sleep(0.3)
    assert len(engine.answers) == 4
    engine.ends_at_once = True
    stream.end()
    assert sum(bool(response.part.finish) for response in stream.call) == 9  # now it reads


def test_an_answer_has_its_time_and_so_has_the_stream(run: Callable[..., Running]) -> None:
    engine = Held()
    stream = Stream(run(engine=engine, call_seconds=1).device(), opening(), question(5))
    late = stream.next()
    assert (late.number, late.failure.code) == (5, "too_slow")
    stream.end()
    assert list(stream.call) == []
    stream = Stream(run(engine=engine, stream_seconds=1).device(), opening(), question(5))
    status, metadata, details = failure(stream.next)
    assert (status, metadata) == ("DEADLINE_EXCEEDED", {"perfit-code": "too_slow"})
    assert "open another" in details
    wait_for(lambda: engine.running == 0)
    stream.end()


@pytest.mark.parametrize("first", [(), (opening(),)])
def test_a_silent_caller_is_let_go(
    run: Callable[..., Running], monkeypatch: pytest.MonkeyPatch, first: tuple[pb.AskRequest, ...]
) -> None:
    engine = Held()
    device = run(engine=engine).device()
    waits = Stream(device, opening(), question(1))  # who waits for an answer is not silent
    wait_for(lambda: len(engine.answers) == 1)
    monkeypatch.setattr(ask_module, "_IDLE_SECONDS", 0.1)
    engine.answers[0].step()
    waits.next()
    silent = Stream(device, *first)
    status, metadata, details = failure(silent.next)
    assert (status, metadata) == ("DEADLINE_EXCEEDED", {"perfit-code": "too_slow"})
    assert "no question" in details
    silent.end()
    time.sleep(0.5)
    engine.answers[0].finish()
    assert waits.next().part.finish
    waits.end()


def answers(device: Device) -> bool:
    """Whether the cloud has room for this device's call."""
    try:
        return bool(list(device.stub.Generate(generate(), timeout=TIMEOUT)))
    except grpc.RpcError as error:
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        return False


@pytest.mark.slow
@pytest.mark.parametrize("method", ["Generate", "Ask"])
def test_a_caller_who_does_not_read_is_cut_off(
    run: Callable[..., Running], monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """gRPC's send held the call for as long as the caller liked."""
    monkeypatch.setattr(guard, "_LATE_SECONDS", 0.5)
    monkeypatch.setattr(listeners, "_GRACE_SECONDS", 10 * TIMEOUT)  # or the connection's end would do it
    engine = Held(piece="x" * 1_000_000)
    running = run(engine=engine, calls=1, streams=1, call_seconds=3, stream_seconds=3)
    device, other = running.device(), running.device()
    if method == "Ask":
        stream = Stream(device, opening(), question(0), timeout=10 * TIMEOUT)
        call = stream.call
    else:
        call = device.stub.Generate(generate(), timeout=10 * TIMEOUT)
    wait_for(lambda: len(engine.answers) == 1)
    engine.ends_at_once = True
    for _ in range(15):  # more than all buffers on the way take
        engine.answers[0].step()
    assert not answers(other)
    wait_for(lambda: answers(other))
    assert engine.running == 0
    call.cancel()
    if method == "Ask":
        stream.end()


def test_the_place_of_an_answer_whose_time_is_over_is_free_though_nobody_reads_it(
    run: Callable[..., Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "_LATE_SECONDS", 10.0 * TIMEOUT)
    engine = Held(piece="x" * 1_000_000)
    running = run(engine=engine, streams=1, call_seconds=3)
    device, other = running.device(), running.device()
    call = device.stub.Generate(generate(), timeout=10 * TIMEOUT)
    wait_for(lambda: len(engine.answers) == 1)
    engine.ends_at_once = True
    for _ in range(15):
        engine.answers[0].step()
    assert not answers(other)
    wait_for(lambda: answers(other))
    assert failure(lambda: list(call))[:2] == ("DEADLINE_EXCEEDED", {"perfit-code": "too_slow"})


def test_one_device_leaves_room_for_the_others(run: Callable[..., Running]) -> None:
    """Three streams of one device took all places."""
    engine = Held()
    running = run(engine=engine, streams=4, answers_each=3, retry_ms=70)
    greedy = running.device()
    stream = Stream(greedy, opening(), *(question(n) for n in range(5)))
    told = failures_of([stream.next() for _ in range(2)])
    assert {(f.code, f.retry_ms) for f in told.values()} == {("busy", 70)}
    assert all("this device" in f.message for f in told.values())
    wait_for(lambda: len(engine.answers) == 3)
    engine.ends_at_once = True
    assert not answers(running.with_certificate(greedy.key, greedy.certificate)), (
        "nor over another connection"
    )
    assert answers(running.device())
    for answer in engine.answers[:3]:
        answer.finish()
    stream.end()
    assert not failures_of(list(stream.call))
    assert answers(greedy)
