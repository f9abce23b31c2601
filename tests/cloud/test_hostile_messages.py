"""Hostile messages beside honest devices, over real TLS with the real engines.

What a hostile device sends is refused with one clear status, and an honest one beside it gets, bit for bit,
what it gets alone, in bounded time. What single messages of streams do wrong: test_service_ask and
test_service_adapt_limits.
"""

from __future__ import annotations

import gzip
from collections.abc import Callable
from typing import Any

import numpy as np
import psutil
import pytest
from tests.support.cloud import BASE, INVALID, TIMEOUT, Running, failure, generate, personal
from tests.support.hostile import PATH, Honest, again_and_again, hostile_tensors, refused
from tests.support.http2 import DATA, END_STREAM, connect, frame, headers

from perfit_cloud.model.artefacts import Artefact
from perfit_shared.shifts import NORM_CAP
from perfit_shared.wire import personalization_pb2 as pb


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
