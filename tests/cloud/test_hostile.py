"""Hostile devices beside honest ones, over real TLS with the real engines.

What a hostile device sends is refused with one clear status, and an honest one beside it gets, bit for bit,
what it gets alone, in bounded time. What single messages of streams do wrong: test_service_ask and
test_service_adapt_limits.
"""

from __future__ import annotations

import gzip
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import grpc
import numpy as np
import psutil
import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tests.support.adapt_calls import EXAMPLES, Stream, examples, mine, opening, step
from tests.support.authority import csr_of, new_key
from tests.support.cloud import BASE, INVALID, TIMEOUT, Device, Running, failure, generate, personal
from tests.support.hostile import PATH, PATIENCE, Honest, hostile_tensors
from tests.support.http2 import DATA, END_STREAM, PING, connect, frame, header_only_calls, headers
from tests.support.limits import under_way
from tests.support.waiting import wait_for

from perfit_cloud.engine.gradients.scheduler import GradientScheduler
from perfit_cloud.model.artefacts import Artefact
from perfit_shared.shifts import NORM_CAP
from perfit_shared.wire import enrollment_pb2 as enrol_pb
from perfit_shared.wire import enrollment_pb2_grpc as enrol_grpc
from perfit_shared.wire import personalization_pb2 as pb


@contextmanager
def again_and_again(act: Callable[[], object], threads: int = 2) -> Iterator[list[int]]:
    """`act` in several threads until the block is left; how often, in the end."""
    over, times = threading.Event(), [0]

    def run() -> None:
        while not over.is_set():
            act()
            times[0] += 1

    workers = [threading.Thread(target=run, daemon=True) for _ in range(threads)]
    for worker in workers:
        worker.start()
    try:
        yield times
    finally:
        over.set()
        for worker in workers:
            worker.join(TIMEOUT)


def refused(call: Callable[[], object]) -> str:
    """Status of a call that may fail."""
    try:
        call()
    except grpc.RpcError as error:
        return str(error.code().name)  # type: ignore[attr-defined]
    return "OK"


# -- what they say -------------------------------------------------------------------------------


def test_bad_tensors_and_requests_without_measure(
    run: Callable[..., Running], artefact: Artefact, honest: Callable[[Running], Honest]
) -> None:
    running = run()
    good, device = honest(running), running.device()
    stub = device.stub

    def shift(data: bytes) -> pb.Shift:
        message, _ = personal(artefact)
        message.personal = data
        return message

    def gradient(data: bytes) -> object:
        return stub.ComputeGradient(pb.ComputeGradientRequest(examples=many(1), shift=shift(data)))

    def many(count: int) -> list[pb.Example]:
        return [pb.Example(prompt=pb.Prompt(text="the cat"), target=" sat")] * count

    fine, _ = personal(artefact)
    acts: list[Callable[[], object]] = [
        *(
            lambda d=data: list(stub.Generate(generate(shift=shift(d))))  # type: ignore[misc]
            for data in hostile_tensors(artefact.spec).values()
        ),
        *(lambda d=data: gradient(d) for data in hostile_tensors(artefact.spec).values()),  # type: ignore[misc]
        lambda: list(stub.Generate(generate("cat " * 100_000))),
        lambda: stub.ComputeGradient(pb.ComputeGradientRequest(examples=many(5_000), shift=fine)),
        lambda: stub.Score(
            pb.ScoreRequest(
                candidates=[pb.Candidate(prompt=pb.Prompt(text="the cat"), answer=" sat")] * 5_000, shift=BASE
            )
        ),
        lambda: list(stub.Generate(generate(max_new_tokens=2**31))),
        lambda: list(stub.Generate(generate(stop=["x" * 65]))),
    ]
    for act in acts:
        assert failure(act)[0] == INVALID
    numbers = iter(range(10**9))
    with again_and_again(lambda: refused(acts[next(numbers) % len(acts)])) as times:
        for _ in range(4):
            good.check()
    assert times[0] > 10


def test_tensors_as_large_as_they_may_be(
    run: Callable[..., Running], artefact: Artefact, honest: Callable[[Running], Honest]
) -> None:
    """They share the passes of honest ones, whose bits they do not change."""
    running = run()
    good, device = honest(running), running.device()
    message, use = personal(artefact, seed=9)
    assert use.personal is not None
    layers = {
        layer: each._replace(
            source=each.source * np.float32(0.99 * NORM_CAP / np.linalg.norm(each.source)),
            bias=each.bias * np.float32(0.99 * NORM_CAP / max(1e-9, np.linalg.norm(each.bias))),
        )
        for layer, each in use.personal.layers.items()
    }
    message.personal = type(use.personal)(layers).to_bytes()
    ask = generate("the dog ran to the door", shift=message, max_new_tokens=30)
    assert refused(lambda: list(device.stub.Generate(ask))) == "OK"
    with again_and_again(lambda: refused(lambda: list(device.stub.Generate(ask)))):
        for _ in range(4):
            good.check()


def test_bytes_that_are_no_messages(
    run: Callable[..., Running], honest: Callable[[Running], Honest], caplog: pytest.LogCaptureFixture
) -> None:
    running = run()
    good, channel = honest(running), running.device().channel
    # No message at all; groups in groups, deeper than protobuf reads; text that is no UTF-8.
    garbage = [b"\xff" * 50, b"\x0a\xff\xff\xff\xff\x0f", b"\x00", b"\x0b" * 2000, b"\x0a\x02\xff\xfe"]
    unary = ["FetchSeed", "Generate", "Score", "ComputeGradient"]
    for data in garbage:
        for name in unary:
            call = channel.unary_stream(PATH + name)
            status, metadata, text = failure(lambda c=call, d=data: list(c(d, timeout=TIMEOUT)))  # type: ignore[misc]
            assert (status, "perfit-code" in metadata) == (INVALID, True), (name, data[:10], text)
        for name in ("Ask", "Adapt"):
            stream = channel.stream_stream(PATH + name)
            found = failure(lambda s=stream, d=data: list(s(iter([d]), timeout=TIMEOUT)))  # type: ignore[misc]
            assert (found[0], "perfit-code" in found[1]) == (INVALID, True), name
    # Several messages where there is one, and none at all.
    twice = channel.stream_stream(PATH + "Describe")
    assert len(list(twice(iter([b"", b""]), timeout=TIMEOUT))) == 1
    none = channel.stream_stream(PATH + "Describe")
    assert failure(lambda: list(none(iter([]), timeout=TIMEOUT)))[:2] == (
        INVALID,
        {"perfit-code": "invalid_input"},
    )
    for path in (PATH + "Nothing", "/perfit.v1.Nothing/Describe", "/", "/grpc.reflection.v1.X/Y"):
        unknown = channel.unary_unary(path)
        assert failure(lambda u=unknown: u(b"", timeout=TIMEOUT))[0] == "UNIMPLEMENTED", path  # type: ignore[misc]
    good.check()
    assert not caplog.records


def test_a_small_message_that_unpacks_to_a_huge_one(
    run: Callable[..., Running], honest: Callable[[Running], Honest]
) -> None:
    """58 KB stand for 60 MB; gRPC unpacks no further than the largest message there may be."""
    running = run()
    good, device = honest(running), running.device()
    bomb = gzip.compress(bytes(60_000_000))
    assert len(bomb) < 65_000  # or it would wait for the window of the connection
    begin = psutil.Process().memory_info().rss
    peak = [begin]
    enrol = running.server.addresses.enrol_address
    with again_and_again(lambda: peak.append(psutil.Process().memory_info().rss), 1):
        for address, who, path in (
            (running.address, device, PATH + "Describe"),
            (enrol, None, "/perfit.v1.Enrollment/Challenge"),
        ):
            with connect(running, address, who) as tls:
                body = b"\x01" + len(bomb).to_bytes(4, "big") + bomb
                tls.sendall(headers(1, path, ("grpc-encoding", "gzip")))
                for at in range(0, len(body), 16_000):
                    flags = END_STREAM if at + 16_000 >= len(body) else 0
                    tls.sendall(frame(DATA, flags, 1, body[at : at + 16_000]))
                tls.settimeout(TIMEOUT)
                told = b""
                while b"Decompressed message larger than max" not in told:
                    told += tls.recv(65536)
    assert max(peak) - begin < 45_000_000
    good.check()


def test_metadata_without_measure(run: Callable[..., Running], honest: Callable[[Running], Honest]) -> None:
    running = run()
    good, device = honest(running), running.device()
    floods: list[list[tuple[str, str | bytes]]] = [
        [("x-large", "a" * 100_000)],
        [(f"x-{number}", "a" * 100) for number in range(2_000)],
        [("perfit-code", "internal"), ("x-bin", bytes(20_000))],
    ]
    for metadata in floods:
        call: Any = lambda m=metadata: device.stub.Describe(pb.DescribeRequest(), metadata=m, timeout=TIMEOUT)  # noqa: E731
        assert refused(call) == "RESOURCE_EXHAUSTED"
    good.check()


# -- what they do --------------------------------------------------------------------------------


def test_calls_without_a_message_on_one_connection_starve_nobody(
    run: Callable[..., Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    # gRPC takes a thread for a call whose message has not come; these were as many as there are threads.
    monkeypatch.setattr("perfit_cloud.service.server._ENROL_AGE_SECONDS", 3)
    monkeypatch.setattr("perfit_cloud.service.server._GRACE_SECONDS", 1)
    running = run(calls=4, calls_each=2)
    enrol, main = running.server.addresses.enrol_address, running.address
    hostile, honest = running.device(), running.device()
    enrol_flood = header_only_calls(running, enrol, "/perfit.v1.Enrollment/Challenge", 60, None)
    with enrol_flood, header_only_calls(running, main, PATH + "Describe", 60, hostile):
        time.sleep(0.5)
        stub = enrol_grpc.EnrollmentStub(running.enrolment())
        assert stub.Challenge(enrol_pb.ChallengeRequest(), timeout=PATIENCE).nonce
        assert honest.stub.Describe(pb.DescribeRequest(), timeout=PATIENCE).cloud_id
        # What the flood does hold is cut off when its connection is old.
        enrol_flood.settimeout(10)
        while enrol_flood.recv(65536):
            pass


def test_calls_without_a_message_over_many_connections_starve_nobody(
    run: Callable[..., Running], honest: Callable[[Running], Honest]
) -> None:
    """Each took a thread before any code of ours ran: six connections of one device took all 68."""
    running = run()
    good, hostile = honest(running), running.device()
    with ExitStack() as held:
        for _ in range(8):
            flood = header_only_calls(running, running.address, PATH + "Describe", 16, hostile)
            held.enter_context(flood)
        wait_for(lambda: under_way(running, hostile) == running.config.calls_each)
        for _ in range(3):
            good.check()
    wait_for(lambda: under_way(running, hostile) == 0)


def test_a_message_that_does_not_come_has_its_time(
    run: Callable[..., Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("perfit_cloud.service.interceptor._MESSAGE_SECONDS", 1.0)
    running = run()
    hostile = running.device()
    with header_only_calls(running, running.address, PATH + "Describe", 3, hostile):
        wait_for(lambda: under_way(running, hostile) == 3)
        wait_for(lambda: under_way(running, hostile) == 0)


def test_replies_that_nobody_reads_are_under_way(
    run: Callable[..., Running],
    artefact: Artefact,
    honest: Callable[[Running], Honest],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A reply was out of all counts as soon as it was made: as many as were asked for stood in memory."""
    monkeypatch.setattr("perfit_cloud.service.interceptor._LATE_SECONDS", 0.5)
    running = run(calls_each=5, call_seconds=3)
    good, hostile = honest(running), running.device()
    no_window = (4).to_bytes(2, "big") + (0).to_bytes(4, "big")  # SETTINGS_INITIAL_WINDOW_SIZE
    request = pb.FetchSeedRequest(artefact=artefact.name).SerializeToString()
    with connect(running, running.address, hostile, no_window) as tls:
        for number in range(16):
            body = b"\0" + len(request).to_bytes(4, "big") + request
            tls.sendall(
                headers(2 * number + 1, PATH + "FetchSeed") + frame(DATA, END_STREAM, 2 * number + 1, body)
            )
        wait_for(lambda: under_way(running, hostile) == 5)
        time.sleep(0.3)
        assert under_way(running, hostile) == 5
        good.check()
        wait_for(lambda: under_way(running, hostile) == 0)  # cut off, though the connection stands


def test_floods_of_calls_and_of_leaving(
    run: Callable[..., Running], honest: Callable[[Running], Honest]
) -> None:
    running = run(requests_minute=150)
    good, hostile = honest(running), running.device()
    seen: set[str] = set()

    def flood() -> None:
        seen.add(refused(hostile.describe))
        hostile.stub.Generate(generate(max_new_tokens=200)).cancel()

    with again_and_again(flood, threads=4) as times:
        wait_for(lambda: "RESOURCE_EXHAUSTED" in seen)
        for _ in range(2):
            good.check()
    assert times[0] > 100
    # gRPC may hang up on a flood of cancelled calls; whoever floods then finds the cloud unavailable.
    assert seen - {"UNAVAILABLE"} == {"OK", "RESOURCE_EXHAUSTED"}
    wait_for(lambda: under_way(running, hostile) == 0)


def test_watching_health_takes_no_calls(
    run: Callable[..., Running], honest: Callable[[Running], Honest]
) -> None:
    """A watch counted as a call of gRPC's, had no end and no thread: some hundred were all there might be."""
    running = run()
    good = honest(running)
    for channel in (running.device().channel, running.enrolment()):
        watch, request = health_pb2_grpc.HealthStub(channel).Watch, health_pb2.HealthCheckRequest()
        for _ in range(200):
            found = failure(lambda w=watch, r=request: list(w(r, timeout=TIMEOUT)))  # type: ignore[misc]
            assert found[0] == "UNIMPLEMENTED"
        listed = health_pb2_grpc.HealthStub(channel).List
        assert (
            failure(lambda f=listed: f(health_pb2.HealthListRequest(), timeout=TIMEOUT))[0] == "UNIMPLEMENTED"
        )  # type: ignore[misc]
    good.check()


def test_pings_without_end_are_hung_up_on(
    run: Callable[..., Running], honest: Callable[[Running], Honest]
) -> None:
    running = run()
    good, hostile = honest(running), running.device()
    with connect(running, running.address, hostile) as tls:
        tls.settimeout(TIMEOUT)
        with pytest.raises(OSError):
            for _ in range(100_000):
                tls.sendall(frame(PING, 0, 0, bytes(8)))
    good.check()


def test_many_connections(run: Callable[..., Running], honest: Callable[[Running], Honest]) -> None:
    running = run()
    good, hostile = honest(running), running.device()
    with ExitStack() as held:
        for _ in range(60):
            held.enter_context(connect(running, running.address, hostile))
            held.enter_context(connect(running, running.server.addresses.enrol_address, None))
        good.check()
        assert refused(running.device().describe) == "OK"  # a new handshake


# -- who they are --------------------------------------------------------------------------------


def test_a_certificate_renews_its_own_identity_alone(run: Callable[..., Running]) -> None:
    running = run()
    victim, hostile = running.device(), running.device()
    key = new_key()
    request = enrol_pb.RenewRequest(csr=csr_of(key, name=victim.identity))
    given = enrol_grpc.IdentityStub(hostile.channel).Renew(request)
    assert running.with_certificate(key, given.certificate).identity == hostile.identity
    # And on the other listener: the victim's certificate, which is no secret, with a key that is not its own.
    stub = enrol_grpc.EnrollmentStub(running.enrolment())
    nonce, csr = stub.Challenge(enrol_pb.ChallengeRequest()).nonce, csr_of(key)
    for signature in (b"", sign(hostile, nonce + csr), sign(hostile, csr)):
        lapsed = enrol_pb.RenewLapsedRequest(
            certificate=victim.certificate, nonce=nonce, csr=csr, signature=signature
        )
        assert failure(lambda r=lapsed: stub.RenewLapsed(r))[0] == "UNAUTHENTICATED"  # type: ignore[misc]
    victim.describe()


def sign(device: Device, data: bytes) -> bytes:
    return device.key.sign(b"perfit-renew-v1" + data, ec.ECDSA(hashes.SHA256()))


@pytest.mark.parametrize("how", ["revoked", "expired"])
def test_a_stream_whose_certificate_ends_gets_no_further(
    run: Callable[..., Running],
    artefact: Artefact,
    step_queue: GradientScheduler,
    monkeypatch: pytest.MonkeyPatch,
    how: str,
) -> None:
    """It was looked at before an answer went out, but the work of it was done."""
    running = run(**({"certificate_seconds": 3} if how == "expired" else {}))
    device = running.device()
    stream = Stream(device, opening(artefact), examples(EXAMPLES))
    stream.ask(step(mine(artefact, 1), [0]))
    submitted = []
    monkeypatch.setattr(step_queue, "submit", submitted.append)
    if how == "expired":
        time.sleep(4)
    else:
        running.authority.revoke(device.identity)
    want = "UNAUTHENTICATED" if how == "expired" else "PERMISSION_DENIED"
    assert failure(lambda: stream.ask(step(mine(artefact, 1), [0])))[0] == want
    assert not submitted
    ask = device.stub.Ask(iter([pb.AskRequest(shift=BASE)]), timeout=TIMEOUT)
    assert failure(lambda: list(ask))[0] == want
    stream.end()
