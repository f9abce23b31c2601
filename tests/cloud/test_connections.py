"""Connections that say nothing: each listener has a number of its own, and nobody holds one for long."""

from __future__ import annotations

import resource
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import grpc
import pytest
from tests.support.cloud import Running, pem
from tests.support.waiting import wait_for

from perfit_cloud.service.descriptors import Connections, open_descriptors
from perfit_shared.wire import enrollment_pb2 as enrol_pb
from perfit_shared.wire import enrollment_pb2_grpc as enrol_grpc


@contextmanager
def silent(address: str, count: int) -> Iterator[list[socket.socket]]:
    """So many connections without a byte."""
    host, port = address.rsplit(":", 1)
    with ExitStack() as held:
        yield [held.enter_context(socket.create_connection((host, int(port)))) for _ in range(count)]


def challenged(running: Running) -> bool:
    """Whether somebody new is answered at once on the enrolment listener."""
    stub = enrol_grpc.EnrollmentStub(running.enrolment())
    try:
        return bool(stub.Challenge(enrol_pb.ChallengeRequest(), timeout=2).nonce)
    except grpc.RpcError:
        return False


def test_silent_connections_to_enrol_take_nothing_of_devices(
    run: Callable[..., Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    """1,100 took all descriptors of the process for two minutes, and no device could connect."""
    monkeypatch.setattr("perfit_cloud.service.listeners._HANDSHAKE_SECONDS", 2)
    running = run(enrol_connections=20)
    device, before = running.device(), open_descriptors()
    with silent(running.server.addresses.enrol_address, 60):
        # Both ends of a connection are in this process; the server closed those beyond its number.
        wait_for(lambda: open_descriptors() <= before + 60 + 20)
        device.describe()
        running.device().describe()
        assert not challenged(running)
        wait_for(lambda: challenged(running))  # its own are free again, though nobody closed one


def test_silent_connections_to_devices_have_their_time(
    run: Callable[..., Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("perfit_cloud.service.listeners._HANDSHAKE_SECONDS", 1)
    running = run(connections=40)
    with silent(running.address, 30) as connections:
        running.device().describe()  # there are more
        for each in connections:
            each.settimeout(20)
            assert each.recv(1) == b""  # closed by the server


def test_who_speaks_tls_and_no_more_has_the_same_time(
    run: Callable[..., Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("perfit_cloud.service.listeners._HANDSHAKE_SECONDS", 1)
    running = run()
    host, port = running.server.addresses.enrol_address.rsplit(":", 1)
    context = ssl.create_default_context(cadata=pem(running.authority.server_ca_der).decode())
    context.set_alpn_protocols(["h2"])
    begun = time.monotonic()
    with context.wrap_socket(socket.create_connection((host, int(port)), 20), server_hostname=host) as tls:
        while tls.recv(1024):
            pass
    assert time.monotonic() - begun < 15


def test_connections_fit_under_the_limit(caplog: pytest.LogCaptureFixture) -> None:
    asked = Connections(4096, 256)
    assert asked.within(20_000) == asked and not caplog.records
    fewer = asked.within(1024)
    assert "1024 files and connections" in caplog.text and "LimitNOFILE" in caplog.text
    assert fewer.devices + fewer.enrolment <= 1024 - 200
    assert fewer.devices > 5 * fewer.enrolment > 0
    least = asked.within(10)
    assert min(least) > 0


def test_descriptors_are_counted_and_the_limit_is_raised_as_far_as_it_may_be() -> None:
    program = """
import socket
from perfit_cloud.service.descriptors import descriptor_limit, open_descriptors, raise_descriptor_limit
before = open_descriptors()
sockets = [socket.socket() for _ in range(7)]
print(open_descriptors() - before, descriptor_limit())
raise_descriptor_limit()
print(open_descriptors() - before, descriptor_limit())
"""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard)),
    )
    raised = hard if hard != resource.RLIM_INFINITY else 2**20
    assert done.stdout.split() == ["7", "64", "7", str(raised)]
