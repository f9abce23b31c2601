"""A front that ends TLS replays, reorders, cuts, redirects, talks down: what devices and servers do then."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import pytest
from cryptography import x509
from tests.support.cloud import Running, failure
from tests.support.front import Front, FrontSettings

from perfit_cloud.service.sealing.keys import ReplicaKeys
from perfit_device.cloud import enrolment as enrolments
from perfit_device.cloud.client import Cloud
from perfit_device.cloud.codec import ShiftUse
from perfit_device.cloud.questions import ask_all
from perfit_device.cloud.sealing import Sealing
from perfit_shared.errors import IdentityRevoked, NotAuthenticated, SealBroken, SealRequired, SealUnknown
from perfit_shared.types import Sampling
from perfit_shared.wire import personalization_pb2 as pb
from perfit_shared.wire import sealing_pb2 as sealing

SAMPLING = Sampling(max_new_tokens=6)
GENERATE = "/perfit.v1.Personalization/Generate"


@pytest.fixture
def running(run: Callable[..., Running]) -> Running:
    return run(front_address="127.0.0.1:0")


@pytest.fixture
def front(running: Running) -> Iterator[Front]:
    made = Front(FrontSettings.of(running.authority, running.front_address))
    yield made
    made.close()


@pytest.fixture
def cloud(running: Running, front: Front) -> Iterator[Cloud]:
    """A device's, whose calls pass through the front."""
    with Cloud(running.enrolled(front.address), sealing=Sealing()) as made:
        yield made


def generate(cloud: Cloud) -> str:
    return "".join(chunk.text for chunk in cloud.generate("the cat sat", ShiftUse(), SAMPLING))


def test_a_front_passes_on_what_it_cannot_read(running: Running, front: Front, cloud: Cloud) -> None:
    with Cloud(running.enrolled(running.address)) as direct:
        wanted = generate(direct)
    assert generate(cloud) == wanted
    assert front.methods() == ["Describe", "Generate"]
    passed = front.calls[-1]
    [(key, key_id)] = passed.metadata
    assert key == "perfit-seal-key"
    assert key_id
    for message in (*passed.requests, *passed.responses):
        assert b"the cat sat" not in message
    certificate = cloud.enrolment.certificate
    assert not any(
        certificate[at : at + 16] in passed.requests[0] for at in range(0, len(certificate) - 16, 16)
    )


def test_a_replay_is_refused(front: Front, cloud: Cloud) -> None:
    generate(cloud)
    passed = front.calls[-1]
    begin: Any = front.upstreams[0].stream_stream(GENERATE)

    def again() -> None:
        list(begin(iter(passed.requests), metadata=passed.metadata, timeout=30))

    status, metadata, _ = failure(again)
    assert (status, metadata["perfit-code"]) == ("INVALID_ARGUMENT", "seal_broken")


def test_a_call_that_was_held_back_is_refused(
    front: Front, cloud: Cloud, wrong_clock: Callable[[float], None]
) -> None:
    generate(cloud)  # the key is there by now, and the certificate known

    def held_back(method: str, messages: Iterator[bytes]) -> Iterator[bytes]:
        for message in messages:
            wrong_clock(301)  # of device and server; the message was sealed before
            yield message

    front.requests = held_back
    with pytest.raises(SealBroken, match="clock"):
        generate(cloud)


def _swapped(_: str, messages: Iterator[bytes]) -> Iterator[bytes]:
    first, second, third = islice(messages, 3)
    yield from (first, third, second)
    yield from messages


def _end_swapped(_: str, messages: Iterator[bytes]) -> Iterator[bytes]:
    """Of an answer: two messages at least, since a busy machine joins others."""
    *before, last, end = messages
    yield from (*before, end, last)


def _twice(_: str, messages: Iterator[bytes]) -> Iterator[bytes]:
    for message in messages:
        yield message
        yield message


def _without_last(_: str, messages: Iterator[bytes]) -> Iterator[bytes]:
    yield from list(messages)[:-1]


def _nothing(_: str, messages: Iterator[bytes]) -> Iterator[bytes]:
    list(messages)
    yield from ()


def _altered(_: str, messages: Iterator[bytes]) -> Iterator[bytes]:
    for message in messages:
        yield message[:-1] + bytes([message[-1] ^ 1])


@pytest.mark.parametrize("tamper", [_end_swapped, _twice, _without_last, _nothing, _altered])
def test_an_answer_that_was_tampered_with_is_an_error(front: Front, cloud: Cloud, tamper: Any) -> None:
    wanted = generate(cloud)
    front.responses = tamper
    with pytest.raises(SealBroken):
        generate(cloud)
    front.responses = lambda _, messages: messages
    assert generate(cloud) == wanted


@pytest.mark.parametrize("tamper", [_nothing, _twice, _altered])
def test_an_answer_of_one_message_too(front: Front, cloud: Cloud, tamper: Any) -> None:
    """Two messages where one should come made gRPC wait until the deadline, five minutes later."""
    cloud.score([("the cat", " sat")], ShiftUse())
    front.responses = tamper
    began = time.monotonic()
    with pytest.raises(SealBroken):
        cloud.score([("the cat", " sat")], ShiftUse())
    assert time.monotonic() - began < 60


def test_an_answer_to_another_call_is_an_error(front: Front, cloud: Cloud) -> None:
    generate(cloud)
    earlier = front.calls[-1].responses

    def other(_: str, messages: Iterator[bytes]) -> Iterable[bytes]:
        list(messages)
        return earlier

    front.responses = other
    with pytest.raises(SealBroken):
        generate(cloud)


@pytest.mark.parametrize("tamper", [_swapped, _twice, _altered])
def test_requests_that_were_tampered_with_are_refused(front: Front, cloud: Cloud, tamper: Any) -> None:
    questions = [("the dog", SAMPLING), ("a bird", SAMPLING)]
    ask_all(cloud, ShiftUse(), questions, in_flight=2)
    front.requests = tamper
    with pytest.raises(SealBroken):
        ask_all(cloud, ShiftUse(), questions, in_flight=2)


def test_requests_that_were_cut_are_refused(running: Running, front: Front, cloud: Cloud) -> None:
    """A stream that a front half-closes: the server must not take what came for all there is."""
    front.requests = lambda _, messages: islice(messages, 1)
    with pytest.raises(SealBroken, match="break off"):
        ask_all(cloud, ShiftUse(), [("the dog", SAMPLING)], in_flight=1)


def test_a_call_goes_to_no_other_method(front: Front, cloud: Cloud) -> None:
    generate(cloud)
    front.method = lambda method: method.replace("Generate", "Score")
    with pytest.raises(SealBroken):
        generate(cloud)


def test_the_artefact_in_the_clear_is_bound(front: Front, cloud: Cloud) -> None:
    artefact = cloud.describe().artefacts[0]

    def renamed(_: str, messages: Iterator[bytes]) -> Iterator[bytes]:
        for message in messages:
            request = sealing.SealedRequest.FromString(message)
            assert request.opening.artefact == artefact.name
            request.opening.artefact = "another"
            yield request.SerializeToString()

    front.requests = renamed
    with pytest.raises(SealBroken):
        cloud.fetch_seed(artefact)


# -- talking a device down -------------------------------------------------------------------------


def _described(change: Callable[[pb.DescribeResponse], None]) -> Any:
    def tamper(method: str, messages: Iterator[bytes]) -> Iterator[bytes]:
        if not method.endswith("/Describe"):
            yield from messages
            return
        for message in messages:
            described = pb.DescribeResponse.FromString(message)
            change(described)
            yield described.SerializeToString()

    return tamper


def test_a_device_that_seals_sends_nothing_where_no_key_is_offered(front: Front, cloud: Cloud) -> None:
    front.responses = _described(lambda described: described.ClearField("sealing_keys"))
    with pytest.raises(SealRequired, match="nothing was sent"):
        generate(cloud)
    assert front.methods() == ["Describe"]


def test_a_key_of_somebody_else_is_refused(run: Callable[..., Running], front: Front, cloud: Cloud) -> None:
    """The front's own, or one that another cloud's CA signed."""
    stranger = run(front_address="127.0.0.1:0")
    own = ReplicaKeys(stranger.authority.certify_sealing_key, life_seconds=60).published()

    def change(described: pb.DescribeResponse) -> None:
        described.ClearField("sealing_keys")
        described.sealing_keys.extend(own)

    front.responses = _described(change)
    with pytest.raises(NotAuthenticated, match="none that this cloud's CA issued"):
        generate(cloud)
    assert front.methods() == ["Describe"]


def test_what_a_front_says_the_cloud_serves_is_not_used(front: Front, cloud: Cloud) -> None:
    """Only the keys of the Describe in the clear are; the rest is asked for once more, sealed."""

    def change(described: pb.DescribeResponse) -> None:
        described.base_model = "another"

    front.responses = lambda method, messages: (
        _described(change)(method, messages) if len(front.calls) == 1 else messages
    )
    assert cloud.describe().base_model != "another"
    assert front.methods() == ["Describe", "Describe"]


def test_a_call_without_its_key_s_id_is_refused(front: Front, cloud: Cloud) -> None:
    front.metadata = lambda _: []
    with pytest.raises(SealRequired):
        generate(cloud)


# -- several servers -------------------------------------------------------------------------------


def test_a_wrong_server_is_met_once(
    run: Callable[..., Running], running: Running, front: Front, cloud: Cloud
) -> None:
    """The device seals anew to a key of the server that answered, and that is the end of it."""
    wanted = generate(cloud)
    other = run(front_address="127.0.0.1:0", state=running.config.state)
    front.upstreams = [Front.upstream(FrontSettings.of(other.authority, other.front_address))]
    front.calls.clear()
    assert generate(cloud) == wanted
    assert front.methods() == ["Generate", "Describe", "Generate"]


def test_a_wrong_server_is_met_once_when_a_device_leaves(
    run: Callable[..., Running], running: Running, front: Front
) -> None:
    other = run(front_address="127.0.0.1:0", state=running.config.state)
    second = Front.upstream(FrontSettings.of(other.authority, other.front_address))
    front.upstreams = [front.upstreams[0], second, second, second]
    enrolment = running.enrolled(front.address)
    enrolments.leave(enrolment, Sealing())
    assert front.methods() == ["Describe", "Leave", "Describe", "Leave"]
    with pytest.raises(IdentityRevoked):
        other.authority.check(x509.load_der_x509_certificate(enrolment.certificate))


def test_a_front_that_never_finds_the_key_s_server_is_no_endless_loop(
    run: Callable[..., Running], running: Running, front: Front, cloud: Cloud
) -> None:
    """It sends Describe to one server, and calls to the other."""
    other = run(front_address="127.0.0.1:0", state=running.config.state)
    second = Front.upstream(FrontSettings.of(other.authority, other.front_address))
    front.upstreams = [front.upstreams[0], second]
    with pytest.raises(SealUnknown):
        generate(cloud)
    assert front.methods() == ["Describe", "Generate", "Describe", "Generate"]


def test_a_process_that_started_anew_has_another_key(
    run: Callable[..., Running], running: Running, front: Front, cloud: Cloud
) -> None:
    """What was recorded before can be opened by nobody, then."""
    generate(cloud)
    passed = front.calls[-1]
    other = run(front_address="127.0.0.1:0", state=running.config.state)
    upstream = Front.upstream(FrontSettings.of(other.authority, other.front_address))
    begin: Any = upstream.stream_stream(GENERATE)
    _, metadata, _ = failure(lambda: list(begin(iter(passed.requests), metadata=passed.metadata, timeout=30)))
    assert metadata["perfit-code"] == "seal_unknown"
    upstream.close()
