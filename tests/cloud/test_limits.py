"""What one request and one caller may take: counted by caller over all connections, refused with a delay."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from tests.support.adapt_calls import EXAMPLES, Stream, examples, mine, opening, step
from tests.support.cloud import BASE, TIMEOUT, Device, Running, failure, generate, personal
from tests.support.doubles import Drip, Slow, describe, score
from tests.support.limits import Clock, rate_limiter, under_way
from tests.support.waiting import wait_for

from perfit_cloud.config import CloudConfig
from perfit_cloud.engine.generation.continuous import GenerationEngine
from perfit_cloud.model.artefacts import Artefact
from perfit_cloud.service.limits import ConcurrencyLimit
from perfit_cloud.service.networks import forwarded_network, network_of
from perfit_shared.errors import Busy, ConfigError
from perfit_shared.types import Chunk, Finish
from perfit_shared.wire import enrollment_pb2 as enrol_pb
from perfit_shared.wire import enrollment_pb2_grpc as enrol_grpc
from perfit_shared.wire import personalization_pb2 as pb

# -- accounts and gates --------------------------------------------------------------------------


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_what_is_held_is_counted_by_caller_and_given_back(clock: Clock) -> None:
    told: list[str] = []
    limiter = rate_limiter(clock, told.append)
    with ExitStack() as held:
        for amount in (60, 40):
            held.enter_context(limiter.hold("a", "bytes", amount))
        with pytest.raises(Busy, match="this device") as caught, limiter.hold("a", "bytes", 1):
            pass
        assert caught.value.retry_ms == 500
        with limiter.hold("b", "bytes", 100), limiter.hold("a", "calls"):
            pass
        with pytest.raises(Busy), limiter.hold("a", "answers"):  # not in the share
            pass
    with limiter.hold("a", "bytes", 100):
        pass
    assert told == ["bytes_each", "answers_each"]


def test_a_minute_s_share_fills_evenly_and_the_delay_is_true(clock: Clock) -> None:
    limiter = rate_limiter(clock)
    limiter.spend("a", "tokens", 6000)  # all at once, after a quiet minute
    with pytest.raises(Busy) as caught:
        limiter.spend("a", "tokens", 1000)
    assert caught.value.retry_ms == 10_000
    limiter.spend("b", "tokens", 6000)
    clock.now += caught.value.retry_ms / 1000 - 0.1
    with pytest.raises(Busy):
        limiter.spend("a", "tokens", 1000)
    clock.now += 0.2
    limiter.spend("a", "tokens", 1000)
    limiter.settle("a", "tokens", 600, 0)
    limiter.spend("a", "tokens", 600)
    with pytest.raises(Busy) as caught:
        limiter.spend("a", "tokens", 20)
    assert caught.value.retry_ms == 500  # and never less
    clock.now += 3600
    limiter.spend("a", "tokens", 6000)
    with pytest.raises(Busy):  # an hour saves up no more than a minute
        limiter.spend("a", "tokens", 100)


def test_accounts_of_the_quiet_are_forgotten(clock: Clock) -> None:
    """A dictionary by identity that nothing was ever taken from would grow for ever."""
    limiter = rate_limiter(clock)
    with limiter.hold("held", "calls"):
        for number in range(10_000):
            clock.now += 0.1
            limiter.spend(f"caller {number}", "requests")
            assert len(limiter) <= 1300  # those of two minutes
        clock.now += 61
        limiter.spend("last", "requests")
        assert len(limiter) == 2
        clock.now += 61
        with pytest.raises(Busy), limiter.hold("held", "calls", 2):  # what it holds is not forgotten
            pass


def test_a_gate_lets_in_as_many_as_it_says() -> None:
    told: list[str] = []
    limit = ConcurrencyLimit("answers", slots=2, retry_ms=70, refused=told.append)
    with limit.hold(), limit.hold():
        assert limit.working == 2
        with pytest.raises(Busy) as caught, limit.hold():
            pass
    assert (caught.value.retry_ms, told, limit.working) == (70, ["answers"], 0)
    with limit.hold():
        pass


@pytest.mark.parametrize(
    ("peer", "want"),
    [
        ("ipv4:192.0.2.7:4711", "192.0.2.7"),
        ("ipv6:%5B::1%5D:4711", "::/64"),
        ("ipv6:%5B2001:db8:1:2:3:4:5:6%5D:4711", "2001:db8:1:2::/64"),
        ("ipv6:%5B::ffff:192.0.2.7%5D:4711", "192.0.2.7"),
    ],
)
def test_callers_without_a_certificate_are_known_by_their_network(peer: str, want: str) -> None:
    assert network_of(peer) == want


@pytest.mark.parametrize(
    ("values", "want"),
    [
        (["192.0.2.7"], "192.0.2.7"),
        (["192.0.2.7:4711"], "192.0.2.7"),
        (["198.51.100.1, 192.0.2.7"], "192.0.2.7"),  # the first is what the caller said itself
        (["198.51.100.1", "192.0.2.7"], "192.0.2.7"),
        (["2001:db8:1:2:3:4:5:6"], "2001:db8:1:2::/64"),
        (["[2001:db8:1:2:3:4:5:6]:4711"], "2001:db8:1:2::/64"),
        (["::ffff:192.0.2.7"], "192.0.2.7"),
        (["192.0.2.7, unknown"], None),
        ([""], None),
        ([], None),
    ],
)
def test_callers_behind_a_front_are_known_by_what_it_added_last(values: list[str], want: str | None) -> None:
    metadata = [("other", "203.0.113.1"), *(("x-forwarded-for", value) for value in values)]
    assert forwarded_network(metadata, "x-forwarded-for") == want


@pytest.mark.parametrize(
    ("change", "says"), [({"bytes_each": 1000}, "bytes_each"), ({"tokens_minute": 1000}, "tokens_minute")]
)
def test_shares_that_no_request_fits_are_refused(change: dict[str, int], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        CloudConfig(**change)  # type: ignore[arg-type]


# -- over the wire ------------------------------------------------------------------------------


def test_busy_says_when_to_come_back(run: Callable[..., Running]) -> None:
    drip = Drip()
    device = run(engine=drip, streams=1, retry_ms=750).device()
    stream = device.stub.Generate(generate(), timeout=TIMEOUT)
    drip.go.release()
    next(stream)
    status, metadata, _ = failure(lambda: list(device.stub.Generate(generate(), timeout=TIMEOUT)))
    assert (status, metadata) == ("RESOURCE_EXHAUSTED", {"perfit-code": "busy", "perfit-retry-ms": "750"})
    device.describe()  # other calls go on
    stream.cancel()


def test_calls_are_bounded(run: Callable[..., Running]) -> None:
    drip = Drip()
    device = run(engine=drip, calls=1).device()
    stream = device.stub.Generate(generate(), timeout=TIMEOUT)
    drip.go.release()
    next(stream)
    assert failure(device.describe)[:2][0] == "RESOURCE_EXHAUSTED"
    stream.cancel()


def test_leaving_frees_the_place_in_the_engine(
    run: Callable[..., Running], generation: GenerationEngine
) -> None:
    device = run().device()
    stream = device.stub.Generate(generate(max_new_tokens=200), timeout=TIMEOUT)
    next(stream)
    stream.cancel()
    wait_for(lambda: generation.health().in_flight == 0)


def test_a_deadline_frees_the_place(run: Callable[..., Running]) -> None:
    drip = Drip()
    device = run(engine=drip).device()
    assert failure(lambda: list(device.stub.Generate(generate(), timeout=0.5)))[0] == "DEADLINE_EXCEEDED"
    assert drip.cancelled.wait(TIMEOUT)


def test_calls_without_a_deadline_end_too(run: Callable[..., Running]) -> None:
    drip = Drip()
    device = run(engine=drip, call_seconds=1).device()
    stream = device.stub.Generate(generate())
    drip.go.release()
    next(stream)
    # The next piece never comes; the end used to be looked at only after a piece.
    assert failure(lambda: next(stream))[:2] == ("DEADLINE_EXCEEDED", {"perfit-code": "too_slow"})
    assert drip.cancelled.is_set()


def test_a_stream_outlives_the_age_of_its_connection(run: Callable[..., Running]) -> None:
    drip = Drip()
    device = run(engine=drip, call_seconds=3).device()  # and so old may a connection get
    device.describe()
    time.sleep(2.2)
    stream = device.stub.Generate(generate())
    for _ in range(3):  # half as long as a call may be
        drip.go.release()
        assert next(stream).text == "word "
        time.sleep(0.5)
    device.describe()  # over a new connection
    stream.cancel()


def test_passes_of_one_device_leave_room_for_others(run: Callable[..., Running]) -> None:
    """One device could have all its calls in the line, and everybody else waited for 16 of its passes."""
    slow = Slow()
    running = run(steps=slow, gradients_each=2, retry_ms=80)
    greedy, honest = running.device(), running.device()
    held = [greedy.stub.Score.future(score(), timeout=TIMEOUT) for _ in range(2)]
    wait_for(lambda: under_way(running, greedy, "gradients") == 2)
    status, metadata, text = failure(lambda: greedy.stub.Score(score(), timeout=TIMEOUT))
    assert (status, metadata) == ("RESOURCE_EXHAUSTED", {"perfit-code": "busy", "perfit-retry-ms": "80"})
    assert "this device" in text
    waiting = honest.stub.Score.future(score(), timeout=TIMEOUT)
    slow.go.set()
    assert [list(call.result().scores) for call in (*held, waiting)] == [[], [], []]
    assert list(greedy.stub.Score(score(), timeout=TIMEOUT).scores) == []


def test_silent_streams_of_one_device_take_its_own_calls_alone(
    run: Callable[..., Running], artefact: Artefact
) -> None:
    """Streams that were opened and never written to held all calls of the cloud, two minutes each."""
    running = run(calls=6, calls_each=3, adaptations_each=9, adaptations=9, retry_ms=750)
    greedy = running.device()
    held = [Stream(running.with_certificate(greedy.key, greedy.certificate)) for _ in range(3)]
    wait_for(lambda: under_way(running, greedy) == 3)
    status, metadata, text = failure(greedy.describe)
    assert (status, metadata) == ("RESOURCE_EXHAUSTED", {"perfit-code": "busy", "perfit-retry-ms": "750"})
    assert "this device" in text
    honest = running.device()
    for _ in range(10):
        honest.describe()
    for stream in held:
        stream.end()
        stream.call.cancel()
    wait_for(lambda: describes(greedy))


def describes(device: Device) -> bool:
    try:
        device.describe()
    except Exception:
        return False
    return True


def test_requests_a_minute(run: Callable[..., Running]) -> None:
    running = run(requests_minute=5)
    greedy, honest = running.device(), running.device()
    for _ in range(5):
        greedy.describe()
    status, metadata, _ = failure(greedy.describe)
    assert (status, metadata["perfit-code"]) == ("RESOURCE_EXHAUSTED", "busy")
    assert 5_000 < int(metadata["perfit-retry-ms"]) <= 12_000
    honest.describe()


class Short:
    """Answers of one token, whatever was asked for."""

    continuous = True

    def submit(self, *_: object) -> Any:
        return self

    def cancel(self) -> None:
        pass

    def __iter__(self) -> Iterator[Chunk]:
        yield Chunk("x", Finish.END, prompt_tokens=1, answer_tokens=1)


def test_an_answer_is_charged_for_what_was_made_of_it(run: Callable[..., Running]) -> None:
    least = {"prompt_tokens": 60, "new_tokens": 60, "call_tokens": 100, "adapt_tokens": 120}
    device = run(engine=Short(), tokens_minute=120, **least).device()
    for _ in range(15):  # 60 tokens are set aside for each
        list(device.stub.Generate(generate("a", max_new_tokens=60)))


def test_tokens_a_minute(run: Callable[..., Running], artefact: Artefact) -> None:
    least = {"prompt_tokens": 60, "new_tokens": 60, "call_tokens": 100, "adapt_tokens": 120}
    least = {"prompt_tokens": 60, "new_tokens": 60, "call_tokens": 100, "adapt_tokens": 120}
    running = run(tokens_minute=120, **least)
    device = running.device()
    message, _ = personal(artefact)
    calls: list[Callable[[], object]] = [
        lambda: list(device.stub.Generate(generate("the cat " * 10, max_new_tokens=60))),
        lambda: device.stub.Score(pb.ScoreRequest(candidates=candidates(), shift=BASE)),
        lambda: device.stub.ComputeGradient(pb.ComputeGradientRequest(examples=pairs(), shift=message)),
        lambda: adapt(device, artefact),
    ]
    for call in calls:
        call()
        spent = failure(lambda c=call: [c() for _ in range(100)])  # type: ignore[misc]
        assert (spent[0], spent[1]["perfit-code"]) == ("RESOURCE_EXHAUSTED", "busy")
        running.server._listeners.of_devices[0].rate_limiter._buckets.clear()


def candidates() -> list[pb.Candidate]:
    return [pb.Candidate(prompt=pb.Prompt(text=text), answer=target) for text, target in EXAMPLES[:2]]


def pairs() -> list[pb.Example]:
    return [pb.Example(prompt=pb.Prompt(text=text), target=target) for text, target in EXAMPLES[:2]]


def adapt(device: Device, artefact: Artefact) -> None:
    stream = Stream(device, opening(artefact), examples(EXAMPLES[:2]), step(mine(artefact, 1), [0]))
    try:
        next(stream.call)
    finally:
        stream.end()
        stream.call.cancel()


def test_bytes_in_flight(run: Callable[..., Running], artefact: Artefact) -> None:
    slow = Slow()
    running = run(steps=slow, bytes_each=150_000, message_bytes=150_000)
    device = running.device()
    call = device.channel.unary_unary("/perfit.v1.Personalization/Score")
    # A field that nobody knows: number 99, of 80,000 bytes.
    large = score().SerializeToString() + b"\x9a\x06\x80\xf1\x04" + bytes(80_000)
    first = call.future(large, timeout=TIMEOUT)
    assert slow.entered.wait(TIMEOUT)
    assert failure(lambda: call(large))[:2] == (
        "RESOURCE_EXHAUSTED",
        {"perfit-code": "busy", "perfit-retry-ms": "500"},
    )
    device.describe()
    slow.go.set()
    assert first.result() == call(large)


def test_a_refused_call_s_message_is_not_taken(run: Callable[..., Running]) -> None:
    """What is over the share is refused at its headers, not after megabytes were received and parsed."""
    running = run(requests_minute=1)
    device = running.device()
    device.describe()
    sent = itertools.count()

    def endless() -> Any:
        for number in sent:
            if number > 200:
                return
            yield pb.AdaptRequest(examples=pb.AdaptExamples(examples=[pb.Example(target="x" * 100_000)]))

    assert failure(lambda: list(device.stub.Adapt(endless(), timeout=TIMEOUT)))[0] == "RESOURCE_EXHAUSTED"
    assert next(sent) < 100


def test_enrolment_is_counted_by_address(run: Callable[..., Running]) -> None:
    running = run(enrol_requests_minute=3)
    stub = enrol_grpc.EnrollmentStub(running.enrolment())
    for _ in range(3):
        stub.Challenge(enrol_pb.ChallengeRequest())
    other = enrol_grpc.EnrollmentStub(running.enrolment())
    for each in (stub, other):
        status, metadata, _ = failure(lambda s=each: s.Challenge(enrol_pb.ChallengeRequest()))  # type: ignore[misc]
        assert (status, metadata["perfit-code"]) == ("RESOURCE_EXHAUSTED", "busy")
    running.device().describe()  # the devices' listener counts for itself
    refused = running.server.telemetry.registry.get_sample_value
    assert refused("perfit_refused_total", {"limit": "enrol_requests_minute"}) == 2


def test_ordinary_use_meets_no_limit(run: Callable[..., Running], artefact: Artefact) -> None:
    """An update of as many examples as there may be, and 12 questions at a time, with the defaults."""
    config = CloudConfig()
    assert config.answers_each >= config.questions == 12
    assert config.tokens_minute >= 4 * config.adapt_tokens
    assert config.bytes_each >= 4 * config.message_bytes
    running = run()
    device = running.device()
    many = [EXAMPLES[number % len(EXAMPLES)] for number in range(4096)]
    stream = Stream(device, opening(artefact), *(examples(many[at : at + 512]) for at in range(0, 4096, 512)))
    assert stream.ask(step(mine(artefact, 1), [0, 4095])).tokens > 0
    for _ in range(30):
        assert stream.ask(step(mine(artefact, 1), [1])).tokens > 0
    stream.end()
    for _ in range(200):
        describe(device.channel)()
