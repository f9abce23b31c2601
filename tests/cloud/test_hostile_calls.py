"""Floods, silence and other hostile behaviour beside honest devices, over real TLS with the real engines.

What a hostile device sends is refused with one clear status, and an honest one beside it gets, bit for bit,
what it gets alone, in bounded time.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tests.support.cloud import TIMEOUT, Running, failure, generate
from tests.support.hostile import PATH, PATIENCE, Honest, again_and_again, refused
from tests.support.http2 import DATA, END_STREAM, PING, connect, frame, header_only_calls, headers
from tests.support.limits import under_way
from tests.support.waiting import wait_for

from perfit_cloud.model.artefacts import Artefact
from perfit_shared.wire import enrollment_pb2 as enrol_pb
from perfit_shared.wire import enrollment_pb2_grpc as enrol_grpc
from perfit_shared.wire import personalization_pb2 as pb


@pytest.mark.slow
def test_calls_without_a_message_on_one_connection_starve_nobody(
    run: Callable[..., Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    # gRPC takes a thread for a call whose message has not come; these were as many as there are threads.
    monkeypatch.setattr("perfit_cloud.service.listeners._ENROL_AGE_SECONDS", 3)
    monkeypatch.setattr("perfit_cloud.service.listeners._GRACE_SECONDS", 1)
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


@pytest.mark.slow
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
    # A cancelled call keeps its stream until its thread is done. Beyond _DEVICE_STREAMS on a connection gRPC
    # refuses a call by REFUSED_STREAM, before any code of ours runs, and that is UNAVAILABLE to the caller.
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
