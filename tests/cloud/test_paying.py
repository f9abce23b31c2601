"""Nothing makes work that it was not charged for, and whoever is refused pays for it all the same."""

from __future__ import annotations

from collections.abc import Callable

import grpc
import pytest
from tests.support.authority import csr_of, new_key
from tests.support.cloud import BASE, INVALID, TIMEOUT, Device, Running, failure, generate
from tests.support.doubles import Drip, Slow, score
from tests.support.limits import Clock, rate_limiter, running_line, under_way
from tests.support.waiting import wait_for

from perfit_cloud.model.base import BaseModel
from perfit_cloud.service.limits import Payment, RateLimiter
from perfit_shared.errors import Busy
from perfit_shared.wire import enrollment_pb2 as enrol_pb
from perfit_shared.wire import enrollment_pb2_grpc as enrol_grpc
from perfit_shared.wire import personalization_pb2 as pb

LEAST = {"prompt_tokens": 60, "new_tokens": 60, "call_tokens": 300, "adapt_tokens": 300}


# -- accounts ---------------------------------------------------------------------------------------


def test_a_text_is_paid_by_its_bytes_and_settled_by_its_tokens() -> None:
    books = rate_limiter(Clock())
    payment = Payment(books, "a", 1000)
    payment.charge(400)
    payment.charge(0)
    assert payment.take().tokens == 102
    assert payment.take().tokens == 0
    payment.charge(10_000_000)  # never more than a message may have
    payment.charge(10_000_000)
    assert payment.take().tokens == 1000
    books.settle("a", "tokens", 1102, 5000)
    books.spend("a", "tokens", 1000)
    with pytest.raises(Busy):
        books.spend("a", "tokens", 1)
    with pytest.raises(Busy):
        payment.charge(4)
    books.settle("a", "tokens", 5000, 100)
    books.spend("a", "tokens", 4900)


def left(books: RateLimiter, caller: str = "a") -> int:
    """Tokens that a caller may still take, of 6000."""
    found = next(n for n in range(6000, -1, -1) if not fails_to_spend(books, caller, n))
    books.settle(caller, "tokens", found, 0)
    return found


def fails_to_spend(books: RateLimiter, caller: str, amount: int) -> bool:
    try:
        books.spend(caller, "tokens", amount)
    except Busy:
        return True
    return False


def test_what_looking_at_a_message_took_is_never_given_back() -> None:
    """A message of 400,000 fields that came to one token was walked for 0.3 s, for nothing."""
    books = rate_limiter(Clock())
    payment = Payment(books, "a", 1000)
    payment.charge(2000)
    payment.walked(2000)
    paid = payment.take()
    assert left(books) == 5499
    paid.settle(1)
    assert left(books) == 5000
    paid.settle(1500)
    assert left(books) == 4500
    payment.walked(4000)  # of a message without a text
    payment.take().settle(0)
    assert left(books) == 2500
    payment.take().settle(0)  # of the next message
    assert left(books) == 2500


def test_a_fine_is_a_debt_that_wears_off() -> None:
    clock = Clock()
    books = rate_limiter(clock)
    books.spend("a", "tokens", 0)
    for _ in range(5):
        books.fine("a", "tokens", 5000)
    with pytest.raises(Busy) as caught:
        books.spend("a", "tokens", 0)
    assert caught.value.retry_ms == 60_000  # and no more, whatever is owed
    books.spend("b", "tokens", 6000)
    clock.now += 61
    books.spend("a", "tokens", 0)


# -- work and its price -----------------------------------------------------------------------------


def refusals(running: Running, limit: str) -> float:
    found = running.server.telemetry.registry.get_sample_value("perfit_refused_total", {"limit": limit})
    return found or 0.0


def refused_until_busy(call: Callable[[], object], status: str, most: int = 40) -> int:
    """How often a call is refused with `status` before its caller has no share left."""
    for times in range(most):
        found, metadata, _ = failure(call)
        if found == "RESOURCE_EXHAUSTED":
            assert metadata["perfit-code"] == "busy"
            return times
        assert found == status
    raise AssertionError(f"{most} refused calls cost nothing")


def nearly_good(count: int) -> pb.ScoreRequest:
    """Candidates that take work, and one at the end that is refused."""
    good = pb.Candidate(prompt=pb.Prompt(text="the cat sat on the mat " * 5), answer=" zebra")
    return pb.ScoreRequest(candidates=[good] * count + [pb.Candidate()], shift=BASE)


def test_refused_requests_pay_for_their_work(run: Callable[..., Running]) -> None:
    """63 long candidates and an empty one made a quarter of a second of work, for nothing."""
    running = run(tokens_minute=1000, **LEAST)
    device = running.device()
    assert 1 < refused_until_busy(lambda: device.stub.Score(nearly_good(5), timeout=TIMEOUT), INVALID) < 10
    assert refusals(running, "tokens_minute") == 1
    running.device().describe()


def test_fields_that_nobody_reads_are_paid_for(run: Callable[..., Running]) -> None:
    running = run(tokens_minute=300, **LEAST)
    device = running.device()
    request = pb.ScoreRequest(
        candidates=[pb.Candidate(prompt=pb.Prompt(text="a"), answer="b")], shift=BASE
    ).SerializeToString()
    call = device.channel.unary_unary("/perfit.v1.Personalization/Score")
    unknown_fields = b"\x9a\x06\x00" * 16
    call(request, timeout=TIMEOUT)
    paid = 0
    with pytest.raises(grpc.RpcError, match="more than one may in a minute"):
        while paid < 80:  # 22 fields: 11 tokens, and the texts have 3
            call(request + unknown_fields, timeout=TIMEOUT)
            paid += 1
    assert paid > 20


def test_bytes_that_are_no_message_are_paid_for(run: Callable[..., Running]) -> None:
    running = run(tokens_minute=100_000, **LEAST)
    device = running.device()
    score = device.channel.unary_unary("/perfit.v1.Personalization/Score")
    garbage = b"\x0b" * 80_000
    times = refused_until_busy(lambda: score(garbage, timeout=TIMEOUT), INVALID)
    assert 3 < times < 10
    assert refusals(running, "message") == times
    running.device().describe()


@pytest.fixture
def encoded(base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The texts that were tokenized as prompts."""
    texts: list[str] = []
    encode = BaseModel.encode

    def noted(self: BaseModel, text: str) -> list[int]:
        texts.append(text)
        return encode(self, text)

    monkeypatch.setattr(BaseModel, "encode", noted)
    return texts


def test_candidates_without_a_place_are_not_tokenized(
    run: Callable[..., Running], encoded: list[str]
) -> None:
    slow = Slow()
    running = run(steps=slow, gradient_waiting=1)
    device, other = running.device(), running.device()
    held = [each.stub.Score.future(score(), timeout=TIMEOUT) for each in (device, other)]
    wait_for(lambda: len(encoded) == 2)
    assert failure(lambda: device.stub.Score(nearly_good(5), timeout=TIMEOUT))[0] == "RESOURCE_EXHAUSTED"
    assert len(encoded) == 2
    slow.go.set()
    assert [list(call.result().scores) for call in held] == [[], []]
    assert failure(lambda: device.stub.Score(nearly_good(5), timeout=TIMEOUT))[0] == INVALID
    assert len(encoded) == 7


def test_a_prompt_without_a_place_is_not_tokenized(run: Callable[..., Running], encoded: list[str]) -> None:
    drip = Drip()
    running = run(engine=drip, streams=1)
    device = running.device()
    stream = device.stub.Generate(generate(), timeout=TIMEOUT)
    drip.go.release()
    next(stream)
    assert failure(lambda: list(running.device().stub.Generate(generate())))[0] == "RESOURCE_EXHAUSTED"
    assert len(encoded) == 1
    stream.cancel()


def test_what_the_cloud_has_no_room_for_is_given_back(run: Callable[..., Running]) -> None:
    """A full Score cost as much as an answer to it, however often the cloud was busy."""
    slow, drip = Slow(), Drip()
    running = run(steps=slow, gradient_waiting=1, engine=drip, streams=1, tokens_minute=1000, **LEAST)
    others, device = [running.device() for _ in range(2)], running.device()
    held = [other.stub.Score.future(score(), timeout=TIMEOUT) for other in others]
    stream = others[0].stub.Generate(generate(), timeout=TIMEOUT)
    drip.go.release()
    next(stream)
    wait_for(lambda: running_line(running) == 1 and slow.entered.is_set())
    calls: list[Callable[[], object]] = [
        lambda: device.stub.Score(nearly_good(5), timeout=TIMEOUT),
        lambda: list(device.stub.Generate(generate("word " * 100), timeout=TIMEOUT)),
    ]
    for call in calls * 10:  # 157 and 128 tokens
        assert failure(call)[::2] == ("RESOURCE_EXHAUSTED", "the cloud is busy; try again shortly")
    slow.go.set()
    stream.cancel()
    assert [list(call.result().scores) for call in held] == [[], []]
    assert list(device.stub.Score(score(), timeout=TIMEOUT).scores) == []


def test_who_cannot_pay_for_the_tokens_gets_nothing_back() -> None:
    books = rate_limiter(Clock())
    payment = Payment(books, "a", 1000)
    payment.charge(2000)
    paid = payment.take()
    with pytest.raises(Busy), paid.refunded():
        paid.settle(7000)
    assert left(books) == 5499


# -- who is refused is counted ----------------------------------------------------------------------


def unknown(device: Device) -> object:
    return device.channel.unary_unary("/perfit.v1.Personalization/Nothing")(b"", timeout=TIMEOUT)


def revoke(running: Running, device: Device) -> None:
    running.authority.revoke(device.identity)


def leave(_running: Running, _device: Device) -> None:
    """Nothing happens to it."""


@pytest.mark.parametrize(
    ("before", "call", "status", "limit"),
    [
        (revoke, Device.describe, "PERMISSION_DENIED", "identity_revoked"),
        (leave, unknown, "UNIMPLEMENTED", "method"),
        (revoke, unknown, "PERMISSION_DENIED", "identity_revoked"),
    ],
)
def test_whoever_is_refused_pays_for_the_call(
    run: Callable[..., Running],
    before: Callable[..., None],
    call: Callable[[Device], object],
    status: str,
    limit: str,
) -> None:
    """A revoked device made 98,000 calls a minute, against 6,000 that others may."""
    running = run(requests_minute=5)
    device, honest = running.device(), running.device()
    before(running, device)
    assert refused_until_busy(lambda: call(device), status) == 5
    assert (refusals(running, limit), refusals(running, "requests_minute")) == (5, 1)
    assert under_way(running, device) == 0
    honest.describe()


def test_a_retired_key_uses_up_nothing_of_its_owner_s(run: Callable[..., Running]) -> None:
    """Whoever held one locked its owner out, for as long as calls of it were refused."""
    running = run(requests_minute=5)
    thief = running.device()
    key = new_key()
    identity = enrol_grpc.IdentityStub(thief.channel)
    answer = identity.Renew(enrol_pb.RenewRequest(csr=csr_of(key)), timeout=TIMEOUT)
    owner = running.with_certificate(key, answer.certificate)
    owner.describe()
    assert refused_until_busy(thief.describe, "UNAUTHENTICATED") == 5
    assert (refusals(running, "certificate_superseded"), refusals(running, "requests_minute")) == (5, 1)
    for _ in range(3):
        owner.describe()


def test_questions_that_are_refused_cost_as_much_as_calls(run: Callable[..., Running]) -> None:
    """A stream of empty ones was one call, however many there were."""
    running = run(requests_minute=5)
    device = running.device()
    sent = [pb.AskRequest(shift=BASE)] + [pb.AskRequest(question=pb.Question(number=n)) for n in range(200)]
    answers: list[str] = []
    stream = device.stub.Ask(iter(sent), timeout=TIMEOUT)

    def read() -> None:
        for response in stream:
            answers.append(response.failure.code)

    assert failure(read)[0] == "RESOURCE_EXHAUSTED"
    assert set(answers) == {"invalid_prompt"} and len(answers) < 30
    running.device().describe()


def test_strangers_who_ask_for_nothing_there_is_are_counted(run: Callable[..., Running]) -> None:
    running = run(enrol_requests_minute=3)
    channel = running.enrolment()
    nothing = channel.unary_unary("/perfit.v1.Enrollment/Nothing")
    assert refused_until_busy(lambda: nothing(b"", timeout=TIMEOUT), "UNIMPLEMENTED") == 3
    enroll = channel.unary_unary("/perfit.v1.Enrollment/Enroll")
    message = enrol_pb.EnrollRequest(secret=bytes(300)).SerializeToString()
    assert failure(lambda: enroll(message, timeout=TIMEOUT))[0] == "RESOURCE_EXHAUSTED"
    assert refusals(running, "enrol_method") == 3
    running.device().describe()


def test_large_messages_of_strangers_are_refused(run: Callable[..., Running]) -> None:
    running = run()
    enroll = running.enrolment().unary_unary("/perfit.v1.Enrollment/Enroll")
    message = enrol_pb.EnrollRequest(secret=bytes(300)).SerializeToString()
    assert failure(lambda: enroll(message, timeout=TIMEOUT))[:2] == (
        INVALID,
        {"perfit-code": "invalid_input"},
    )
    assert refusals(running, "enrol_message") == 1
