"""A cloud behind a balancer that passes TLS through: callers keep their addresses, and nobody invents one."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import resource
import socket
import struct
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.balancers import environment_of, envoy_process, free_port, haproxy, needs_haproxy
from tests.support.cloud import Running, failure, key_pem, pem
from tests.support.waiting import wait_for

from perfit_cloud.config import CloudConfig
from perfit_cloud.service.proxied import HEADER_MOST, ProxiedListener, read_header
from perfit_device.cloud.client import Cloud
from perfit_device.cloud.sealing import Sealing
from perfit_shared.errors import ConfigError, SealRequired
from perfit_shared.wire import enrollment_pb2 as enrol_pb
from perfit_shared.wire import enrollment_pb2_grpc as enrol_grpc

SIGNATURE = b"\r\n\r\n\x00\r\nQUIT\n"
LOOPBACK = ("127.0.0.0/8",)


def header(source: str, port: int = 50124, *, command: int = 0x21, more: bytes = b"") -> bytes:
    """As a balancer writes it."""
    address = ipaddress.ip_address(source)
    family = 0x11 if address.version == 4 else 0x21
    body = address.packed + address.packed + struct.pack("!HH", port, 7443) + more
    return SIGNATURE + struct.pack("!BBH", command, family, len(body)) + body


def test_who_is_behind_a_header() -> None:
    four, six = header("192.0.2.7"), header("2001:db8::7", more=b"\x03\x00\x04abcd")
    assert read_header(four + b"rest") == (28, "ipv4:192.0.2.7:50124")
    assert read_header(six + b"rest") == (52 + 7, "ipv6:[2001:db8::7]:50124")
    assert read_header(header("192.0.2.7", command=0x20)) == (28, None), "the balancer's own check"
    assert read_header(SIGNATURE + b"\x20\x00\x00\x00") == (16, None)
    for cut in range(len(six)):
        assert read_header(six[:cut]) is None, "not whole yet"


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01",  # TLS, from somebody who is no balancer
        b"PROXY TCP4 192.0.2.7 192.0.2.8 1 2\r\n",  # version 1
        header("192.0.2.7", command=0x11),
        header("192.0.2.7", command=0x22),
        header("192.0.2.7", more=bytes(HEADER_MOST)),
        SIGNATURE + b"\x21\x00\x00\x00",  # for nobody
        SIGNATURE + b"\x21\x31" + struct.pack("!H", 216),  # a Unix socket
        SIGNATURE + b"\x21\x12" + struct.pack("!H", 12),  # UDP
        SIGNATURE + b"\x21\x11" + struct.pack("!H", 11),  # too short for two addresses
    ],
)
def test_what_is_no_header(data: bytes) -> None:
    with pytest.raises(ValueError):
        read_header(data)


@given(st.binary(max_size=80), st.booleans())
def test_any_bytes_are_a_header_or_refused(data: bytes, signed: bool) -> None:
    data = SIGNATURE + data if signed else data
    try:
        found = read_header(data)
    except ValueError:
        return
    assert found is None or 16 <= found[0] <= min(len(data), HEADER_MOST)


def test_networks_are_checked() -> None:
    with pytest.raises(ConfigError, match="proxy_networks"):
        CloudConfig(proxy_networks=("10.0.0.1/8",))


# -- a server ------------------------------------------------------------------------------------


def gone(address: str, data: bytes) -> bool:
    """Whether the server closes a connection that begins so."""
    host, port = address.rsplit(":", 1)
    with socket.create_connection((host, int(port)), 10) as plain:
        plain.sendall(data)
        try:
            return plain.recv(1) == b""
        except ConnectionResetError:
            return True


def test_nobody_comes_past_the_balancer(run: Callable[..., Running], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("perfit_cloud.service.listeners._HANDSHAKE_SECONDS", 1)
    running = run(proxy_networks=LOOPBACK)
    for address in (running.address, running.server.addresses.enrol_address):
        assert gone(address, b"\x16\x03\x01\x00\x05hello"), "no header"
        assert gone(address, header("192.0.2.7")[:20]), "half a header"
    elsewhere = run(proxy_networks=("192.0.2.0/24",))
    assert gone(elsewhere.address, header("192.0.2.7")), "not from a balancer's network"


def test_sealed_calls_come_through_a_balancer_too(run: Callable[..., Running]) -> None:
    running = run(proxy_networks=LOOPBACK, front_address="127.0.0.1:0")
    assert gone(running.front_address, b"\x16\x03\x01\x00\x05hello"), "no header"
    with balanced(running.front_address) as address:
        with Cloud(running.enrolled(address), sealing=Sealing()) as cloud:
            assert cloud.describe().cloud_id == running.authority.cloud_id
        with Cloud(running.enrolled(address)) as cloud, pytest.raises(SealRequired):
            cloud.fetch_seed(cloud.describe().artefacts[0])


# -- what is left of connections -----------------------------------------------------------------


@pytest.fixture
def listening() -> Iterator[Callable[..., ProxiedListener]]:
    """Listeners in front of a server of the test's own."""
    made: list[ProxiedListener] = []

    def listen(target: int, **change: Any) -> ProxiedListener:
        settings: dict[str, Any] = {"connections": 8, "header_seconds": 5, **change}
        networks = [ipaddress.ip_network("127.0.0.0/8")]
        made.append(ProxiedListener("127.0.0.1:0", networks, **settings))
        made[-1].start(target)
        return made[-1]

    yield listen
    for each in made:
        each.close()


def came_in(listener: ProxiedListener) -> socket.socket:
    """A connection that the listener has accepted, and that has not said whose it is."""
    before = len(listener._open)
    caller = socket.create_connection(("127.0.0.1", listener.port), 10)
    wait_for(lambda: len(listener._open) > before)
    return caller


@pytest.mark.parametrize("is_full", [False, True], ids=["some is unread", "nothing more fits"])
def test_a_caller_who_does_not_read_is_cut_off(
    listening: Callable[..., ProxiedListener], monkeypatch: pytest.MonkeyPatch, is_full: bool
) -> None:
    """gRPC gives up such a connection; ours to the caller stayed for as long as the caller liked."""
    monkeypatch.setattr("perfit_cloud.service.proxied._STALLED_SECONDS", 0.5)
    monkeypatch.setattr("perfit_cloud.service.proxied._LAST_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as target:
        listener = listening(target.getsockname()[1])
        with came_in(listener) as caller:
            [side] = listener._open
            caller.sendall(header("192.0.2.7"))
            served, _ = target.accept()
            served.settimeout(1)
            with contextlib.suppress(TimeoutError, ConnectionError):
                while is_full or not side.transport.get_write_buffer_size():
                    served.sendall(bytes(32768))
            served.close()
            wait_for(lambda: not listener._open, seconds=10)


def test_where_no_descriptor_is_left_the_caller_is_told(listening: Callable[..., ProxiedListener]) -> None:
    """It stayed connected to nothing, for ever."""
    with socket.create_server(("127.0.0.1", 0)) as target:
        listener = listening(target.getsockname()[1])
        with came_in(listener) as caller, no_descriptors():
            caller.sendall(header("192.0.2.7"))
            caller.settimeout(10)
            assert caller.recv(1) == b""
        assert not listener._callers


@contextlib.contextmanager
def no_descriptors() -> Iterator[None]:
    """This process opens nothing meanwhile."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(0)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_no_more_callers_than_connections(listening: Callable[..., ProxiedListener]) -> None:
    """Those who have not said yet whose they are counted half."""
    with socket.create_server(("127.0.0.1", 0)) as target, contextlib.ExitStack() as callers:
        listener = listening(target.getsockname()[1], connections=2)
        for _ in range(2):
            callers.enter_context(came_in(listener))
        late = callers.enter_context(socket.create_connection(("127.0.0.1", listener.port), 10))
        late.settimeout(2)
        with contextlib.suppress(ConnectionResetError):
            assert late.recv(1) == b""


@contextlib.contextmanager
def balanced(address: str) -> Iterator[str]:
    """Where a balancer listens that passes connections on to `address`, with a header before each."""
    host, port = address.rsplit(":", 1)

    def passed_on(source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = listener.accept()
                far = socket.create_connection((host, int(port)), 10)
                far.settimeout(None)
                far.sendall(header("192.0.2.7"))
                sockets.extend([near, far])
                for pair in ((near, far), (far, near)):
                    threading.Thread(target=passed_on, args=pair, daemon=True).start()

    sockets: list[socket.socket] = []
    listener = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=accept, daemon=True).start()
    try:
        yield f"127.0.0.1:{listener.getsockname()[1]}"
    finally:
        for each in (listener, *sockets):
            each.close()


def challenge(running: Running, port: int) -> Callable[[], bytes]:
    channel = running.open(
        f"127.0.0.1:{port}", grpc.ssl_channel_credentials(pem(running.authority.server_ca_der))
    )
    stub = enrol_grpc.EnrollmentStub(channel)
    return lambda: stub.Challenge(enrol_pb.ChallengeRequest(), timeout=20).nonce


def page(port: int, path: str) -> int:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        return error.code


def test_the_page_says_whether_calls_are_taken(run: Callable[..., Running]) -> None:
    port = free_port()
    running = run(metrics_address=f"127.0.0.1:{port}")
    assert [page(port, path) for path in ("/ready", "/live", "/metrics")] == [200, 200, 200]
    running.server.telemetry.serving(is_so=False, restart_helps=True)  # as when an engine is stuck
    assert [page(port, path) for path in ("/ready", "/live")] == [503, 503]
    running.server.telemetry.draining()
    assert [page(port, path) for path in ("/ready", "/live")] == [503, 200], "nobody should kill it now"


@needs_haproxy
def test_limits_by_address_hold_behind_haproxy(run: Callable[..., Running]) -> None:
    check, front, devices, other = (free_port() for _ in range(4))
    running = run(proxy_networks=LOOPBACK, enrol_requests_minute=3, metrics_address=f"127.0.0.1:{check}")
    environment = environment_of(
        devices=devices,
        enrol=front,
        enrolment=(running.server.addresses.enrol_address, check),
        replicas=[(running.address, check)],
    )
    # A second way to the same front, as from another machine.
    more = f"listen elsewhere\n  bind 127.0.0.1:{other}\n  server front 127.0.0.1:{front} source 127.0.0.2\n"
    with haproxy(environment=environment, ports=[front, devices, other], more=more):
        here, there = challenge(running, front), challenge(running, other)
        assert all(here() for _ in range(3))
        assert failure(here)[0] == "RESOURCE_EXHAUSTED", "its own address has used its share"
        assert all(there() for _ in range(3)), "another address has a share of its own"
        assert failure(there)[0] == "RESOURCE_EXHAUSTED"
        # A device, over mutual TLS, end to end through HAProxy.
        device = running.device()
        roots = pem(running.authority.server_ca_der)
        credentials = grpc.ssl_channel_credentials(roots, key_pem(device.key), pem(device.certificate))
        device.channel = running.open(f"127.0.0.1:{devices}", credentials)
        assert device.describe().cloud_id == running.authority.cloud_id
        sides = [side for each in running.server._listeners.all for side in each.proxied._open]
        sockets = [side.transport.get_extra_info("socket") for side in sides]
        assert len(sockets) >= 4, "of enrolment, and of the device"
        assert all(each.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) for each in sockets), (
            "it took 44 ms"
        )


def test_limits_by_address_hold_behind_envoy(run: Callable[..., Running]) -> None:
    check, front, devices, admin = (free_port() for _ in range(4))
    running = run(proxy_networks=LOOPBACK, enrol_requests_minute=3, metrics_address=f"127.0.0.1:{check}")
    enrol_port = running.server.addresses.enrol_address.rpartition(":")[2]
    changes = {
        "address: 0.0.0.0, port_value: 7443": f"address: 127.0.0.1, port_value: {devices}",
        "address: 0.0.0.0, port_value: 7444": f"address: 127.0.0.1, port_value: {front}",
        "address: 10.0.0.10, port_value: 7444": f"address: 127.0.0.1, port_value: {enrol_port}",
        "port_value: 9901": f"port_value: {admin}",
        "port_value: 9464": f"port_value: {check}",
    }
    with envoy_process(changes, [front, devices]):
        here = challenge(running, front)
        wait_for(lambda: _answered(here))
        for _ in range(3):
            time.sleep(0.05)
            status = _status(here)
        assert status == "RESOURCE_EXHAUSTED", "its own address has used its share"


def _answered(call: Callable[[], bytes]) -> bool:
    return _status(call) == "OK"


def _status(call: Callable[[], bytes]) -> str:
    try:
        call()
    except grpc.RpcError as error:
        return str(error.code().name)
    return "OK"
