"""Stand-ins for the engines and for what no gRPC client does: for the tests of the service."""

from __future__ import annotations

import queue
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc
from tests.cloud.serving import (
    BASE,
    TIMEOUT,
    Device,
    Running,
    key_pem,
    pem,
)

from perfit_shared.types import Chunk, Finish
from perfit_shared.wire import personalization_pb2 as pb
from perfit_shared.wire import personalization_pb2_grpc as pb_grpc


class Drip:
    """A generation engine whose answers come piece by piece when a test says so, or never."""

    continuous = True

    def __init__(self) -> None:
        self.go = threading.Semaphore(0)
        self.submitted = threading.Event()
        self.cancelled = threading.Event()

    def submit(self, *_: object) -> Drip:
        self.submitted.set()
        return self

    def cancel(self) -> None:
        self.cancelled.set()
        self.go.release()

    def __iter__(self) -> Iterator[Chunk]:
        while self.go.acquire() and not self.cancelled.is_set():
            yield Chunk("word ")


class Held:
    """An engine whose answers say `piece` each time a test lets them, and end when it wants them to."""

    continuous = True

    def __init__(self, *, piece: str = "word ") -> None:
        self.piece = piece
        self.ends_at_once = False
        self.answers: list[HeldAnswer] = []

    def submit(self, *_: object) -> HeldAnswer:
        answer = HeldAnswer(self.piece)
        self.answers.append(answer)
        if self.ends_at_once:
            answer.finish()
        return answer

    @property
    def running(self) -> int:
        return sum(not answer.is_over for answer in self.answers)


class HeldAnswer:
    def __init__(self, piece: str) -> None:
        self._steps: queue.SimpleQueue[Chunk | None] = queue.SimpleQueue()
        self._piece = piece
        self.is_over = False

    def step(self) -> None:
        self._steps.put(Chunk(self._piece))

    def finish(self) -> None:
        self._steps.put(Chunk("", Finish.END, 3, 2))

    def cancel(self) -> None:
        self.is_over = True
        self._steps.put(None)

    def __iter__(self) -> Iterator[Chunk]:
        while (piece := self._steps.get()) is not None and not self.is_over:
            yield piece


class Slow:
    """Gradients that take until the test lets them."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.entered = threading.Event()
        self.go = threading.Event()

    def score(self, *_: object) -> list[Any]:
        if self.error is not None:
            raise self.error
        self.entered.set()
        self.go.wait(TIMEOUT)
        return []


def score() -> pb.ScoreRequest:
    candidate = pb.Candidate(prompt=pb.Prompt(text="the cat"), answer=" zebra")
    return pb.ScoreRequest(candidates=[candidate], shift=BASE)


def describe(channel: grpc.Channel) -> Callable[[], object]:
    return lambda: pb_grpc.PersonalizationStub(channel).Describe(pb.DescribeRequest(), timeout=5)


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.02)


# Frames of HTTP/2, to do what no gRPC client lets one do.
DATA, HEADERS, SETTINGS, PING, END_STREAM, END_HEADERS = 0x0, 0x1, 0x4, 0x6, 0x1, 0x4


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload


def headers(stream: int, path: str, *more: tuple[str, str]) -> bytes:
    """The frame that begins a call."""
    fields = [
        (":method", "POST"),
        (":scheme", "https"),
        (":path", path),
        (":authority", "localhost"),
        ("content-type", "application/grpc"),
        ("te", "trailers"),
        *more,
    ]
    # Literal header fields without indexing, RFC 7541 6.2.2.
    block = b"".join(
        b"\0" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode()
        for name, value in fields
    )
    return frame(HEADERS, END_HEADERS, stream, block)


def connect(running: Running, address: str, device: Device | None, settings: bytes = b"") -> ssl.SSLSocket:
    """A connection that speaks HTTP/2, with no gRPC on our side of it."""
    context = ssl.create_default_context(cadata=pem(running.authority.server_ca_der).decode())
    context.set_alpn_protocols(["h2"])
    if device is not None:
        file = running.config.state / "device.pem"
        file.write_bytes(key_pem(device.key) + pem(device.certificate))
        context.load_cert_chain(file)
    host, port = address.rsplit(":", 1)
    tls = context.wrap_socket(socket.create_connection((host, int(port)), TIMEOUT), server_hostname=host)
    tls.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(SETTINGS, 0, 0, settings))
    return tls


def header_only_calls(
    running: Running, address: str, path: str, count: int, device: Device | None
) -> ssl.SSLSocket:
    """A connection on which `count` calls were begun that never send their message, nor any deadline."""
    tls = connect(running, address, device)
    tls.sendall(b"".join(headers(2 * i + 1, path) for i in range(count)))
    return tls
