"""How a cloud stops: health flips, what runs may end, what is new is told when to come back."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from grpc_health.v1 import health_pb2, health_pb2_grpc
from tests.support.adapt_calls import EXAMPLES, examples, mine, opening, step
from tests.support.adapt_calls import Stream as AdaptStream
from tests.support.ask_calls import Stream as AskStream
from tests.support.ask_calls import opening as ask_opening
from tests.support.ask_calls import question
from tests.support.cloud import TIMEOUT, Running, failure, generate
from tests.support.doubles import Drip, Held, Slow, score
from tests.support.waiting import wait_for

from perfit_cloud.engine.gradients.scheduler import GradientScheduler
from perfit_cloud.model.artefacts import Artefact
from perfit_cloud.service.drain import Drain
from perfit_shared.wire import enrollment_pb2 as enrol_pb
from perfit_shared.wire import enrollment_pb2_grpc as enrol_grpc

STOPPING = ("UNAVAILABLE", {"perfit-code": "unavailable", "perfit-retry-ms": "2000"})


@contextmanager
def stopping(running: Running, grace: float = TIMEOUT, **how: Any) -> Iterator[threading.Thread]:
    """The server stops in another thread; that it has begun to is seen from outside when this is entered."""
    thread = threading.Thread(target=running.server.stop, args=(grace,), kwargs=how)
    thread.start()
    wait_for(lambda: running.server.telemetry.registry.get_sample_value("perfit_draining"))
    yield thread
    thread.join(TIMEOUT)
    assert not thread.is_alive()


def test_health_and_drain(run: Callable[..., Running]) -> None:
    drip = Drip()
    running = run(engine=drip)
    device = running.device()
    ask, states = health_pb2.HealthCheckRequest, health_pb2.HealthCheckResponse
    checks = [
        (health_pb2_grpc.HealthStub(channel), service)
        for channel, service in (
            (device.channel, "perfit.v1.Personalization"),
            (running.enrolment(), "perfit.v1.Enrollment"),
        )
    ]
    for health, service in checks:
        assert health.Check(ask(service=service)).status == states.SERVING
        assert health.Check(ask()).status == states.SERVING
        assert failure(lambda h=health: h.Check(ask(service="x")))[0] == "NOT_FOUND"  # type: ignore[misc]
    stream = device.stub.Generate(generate(), timeout=TIMEOUT)
    drip.go.release()
    next(stream)
    enrol = enrol_grpc.EnrollmentStub(running.enrolment())
    late = running.device()
    with stopping(running):
        for health, service in checks:
            assert health.Check(ask(service=service), timeout=TIMEOUT).status == states.NOT_SERVING
        drip.go.release()
        assert next(stream).text == "word "  # what runs may end
        # gRPC's own refusal of a server that stops says nothing of when to come back.
        for refused in (device, late):
            assert failure(refused.describe)[:2] == STOPPING
            assert failure(lambda d=refused: list(d.stub.Generate(generate())))[:2] == STOPPING  # type: ignore[misc]
        assert failure(lambda: enrol.Challenge(enrol_pb.ChallengeRequest()))[:2] == STOPPING
        stream.cancel()


def test_a_call_that_runs_gets_its_answer(run: Callable[..., Running]) -> None:
    slow = Slow()
    running = run(steps=slow)
    device = running.device()
    call = device.stub.Score.future(score(), timeout=TIMEOUT)
    assert slow.entered.wait(TIMEOUT)
    with stopping(running) as thread:
        time.sleep(0.3)
        assert thread.is_alive()
        slow.go.set()
        assert list(call.result().scores) == []


def test_an_update_ends_between_two_messages(
    run: Callable[..., Running], artefact: Artefact, step_queue: GradientScheduler
) -> None:
    """Both when the device has the word and when the cloud has: its step is answered, and no other."""
    running, held = run(), threading.Event()
    waits, works = (AdaptStream(running.device(), opening(artefact), examples(EXAMPLES)) for _ in range(2))
    for each in (waits, works):
        each.ask(step(mine(artefact, 1), [0]))
    submit, entered = step_queue.submit, threading.Event()

    def slow(*args: Any, **kwargs: Any) -> Any:
        entered.set()
        assert held.wait(TIMEOUT)
        return submit(*args, **kwargs)

    step_queue.submit = slow  # type: ignore[method-assign]
    try:
        works.send(step(mine(artefact, 2), [0, 1]))
        assert entered.wait(TIMEOUT)
        with stopping(running):
            assert failure(lambda: next(waits.call))[:2] == STOPPING
            held.set()
            assert next(works.call).tokens > 0
            works.send(step(mine(artefact, 3), [0, 1]))
            assert failure(lambda: next(works.call))[:2] == STOPPING
    finally:
        step_queue.submit = submit  # type: ignore[method-assign]
        waits.end()
        works.end()


def test_questions_under_way_are_answered_and_later_ones_turned_away(run: Callable[..., Running]) -> None:
    engine = Held()
    running = run(engine=engine)
    stream = AskStream(running.device(), ask_opening(), question(0), question(1))
    idle = AskStream(running.device(), ask_opening())
    wait_for(lambda: len(engine.answers) == 2)
    with stopping(running):
        assert failure(idle.next)[:2] == STOPPING
        stream.send(question(2))
        turned_away = stream.next()
        assert (turned_away.number, turned_away.failure.code) == (2, "unavailable")
        assert turned_away.failure.retry_ms == 2000
        for answer in engine.answers:
            answer.finish()
        ended = {stream.next().number for _ in range(2)}
        assert ended == {0, 1}
        assert failure(stream.next)[:2] == STOPPING
    stream.end()
    idle.end()


def test_a_caller_who_has_asked_all_hears_of_no_stop(run: Callable[..., Running]) -> None:
    engine = Held()
    running = run(engine=engine)
    stream = AskStream(running.device(), ask_opening(), question(0))
    stream.end()
    wait_for(lambda: len(engine.answers) == 1)
    with stopping(running):
        engine.answers[0].finish()
        assert [response.number for response in stream.call] == [0]


def test_what_does_not_end_in_time_is_cut_off(run: Callable[..., Running]) -> None:
    drip = Drip()
    running = run(engine=drip)
    stream = running.device().stub.Generate(generate(), timeout=TIMEOUT)
    drip.go.release()
    next(stream)
    begun = time.monotonic()
    with stopping(running, 1):
        assert failure(lambda: next(stream))[0] in {"UNAVAILABLE", "CANCELLED"}
    assert 1 <= time.monotonic() - begun < 10
    assert drip.cancelled.wait(TIMEOUT)


def test_a_second_signal_cuts_it_short(run: Callable[..., Running]) -> None:
    drip, hurry = Drip(), threading.Event()
    running = run(engine=drip)
    stream = running.device().stub.Generate(generate(), timeout=TIMEOUT)
    drip.go.release()
    next(stream)
    begun = time.monotonic()
    with stopping(running, is_hurried=hurry.is_set):
        hurry.set()
    assert time.monotonic() - begun < 10
    assert failure(lambda: next(stream))[0] in {"UNAVAILABLE", "CANCELLED"}


def test_listeners_hear_of_a_drain_once_and_late_ones_at_once() -> None:
    drain, heard = Drain(), []
    with drain.listening(lambda: heard.append("early")):
        drain.begin()
        with drain.listening(lambda: heard.append("late")):
            pass
    drain.begin()
    assert heard == ["early", "late"]
    assert drain.wait(0, lambda: False)
