"""The service over real TLS on loopback, with the real engines: who may call, what they get, how it ends."""

from __future__ import annotations

import itertools
import logging
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tests.cloud.serving import (
    BASE,
    INVALID,
    TIMEOUT,
    Device,
    Running,
    failure,
    generate,
    key_pem,
    pem,
    personal,
)
from tests.cloud.test_authority import csr_of, new_key

from perfit_cloud.engine.generation import GenerationEngine
from perfit_cloud.engine.gradients import GradientEngine
from perfit_cloud.engine.types import Finish, Mode, Piece, Sampling, ShiftUse
from perfit_cloud.model.artefacts import Artefact
from perfit_cloud.model.base import BaseModel
from perfit_cloud.service.authority import Authority
from perfit_cloud.service.server import Addresses, only_server
from perfit_shared.errors import ConfigError, InvalidTensors
from perfit_shared.shifts import ShiftTensors, gradient_from_bytes
from perfit_shared.wire import enrollment_pb2 as enrol_pb
from perfit_shared.wire import enrollment_pb2_grpc as enrol_grpc
from perfit_shared.wire import personalization_pb2 as pb
from perfit_shared.wire import personalization_pb2_grpc as pb_grpc


def test_describe_and_seed(run: Callable[..., Running], artefact: Artefact, base: BaseModel) -> None:
    running = run()
    device = running.device()
    told = device.describe()
    assert (told.fingerprint, told.cloud_id) == (base.fingerprint, running.authority.cloud_id)
    assert [a.name for a in told.artefacts] == [artefact.name]
    seed = device.stub.FetchSeed(pb.FetchSeedRequest(artefact=artefact.name))
    spec = artefact.spec
    assert ShiftTensors.from_bytes(seed.seed, spec, spec.personal_rank).digest() == artefact.seed.digest()
    status, metadata, message = failure(lambda: device.stub.FetchSeed(pb.FetchSeedRequest(artefact="x")))
    assert (status, metadata) == ("NOT_FOUND", {"perfit-code": "not_found"})
    assert artefact.name in message


def test_answers_are_the_engines(
    run: Callable[..., Running], artefact: Artefact, base: BaseModel, generation: GenerationEngine
) -> None:
    device = run().device()
    message, use = personal(artefact)
    texts = set()
    for shift, expected_use in ((BASE, ShiftUse(Mode.BASE)), (message, use)):
        expected = list(generation.submit(base.encode("the cat sat"), expected_use, Sampling(12)))
        got = list(device.stub.Generate(generate(shift=shift), timeout=TIMEOUT))
        assert "".join(m.text for m in got) == "".join(p.text for p in expected)
        assert [m.finish for m in got[:-1]] == [pb.FINISH_REASON_UNSPECIFIED] * (len(got) - 1)
        finish = pb.FINISH_REASON_END if expected[-1].finish is Finish.END else pb.FINISH_REASON_LENGTH
        assert got[-1].finish == finish
        assert got[-1].prompt_tokens == len(base.encode("the cat sat"))
        assert got[-1].answer_tokens == expected[-1].answer_tokens
        texts.add("".join(m.text for m in got))
    assert len(texts) == 2  # the personal shift is on


def test_an_answer_arrives_while_it_is_made(
    run: Callable[..., Running], generation: GenerationEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    device, go, made = run().device(), threading.Event(), itertools.count(1)
    forward = generation._forward

    def held(plan: Any) -> Any:
        """The engine stands still at its 20th pass until the first message was read."""
        if next(made) == 20:
            assert go.wait(TIMEOUT)
        return forward(plan)

    monkeypatch.setattr(generation, "_forward", held)
    stream = device.stub.Generate(generate(max_new_tokens=60), timeout=TIMEOUT)
    first = next(stream)
    assert generation.in_flight == 1
    assert (bool(first.text), first.finish) == (True, pb.FINISH_REASON_UNSPECIFIED)
    go.set()
    rest = list(stream)
    assert len(rest) >= 1
    assert rest[-1].answer_tokens > 20


def test_scores_and_gradients_are_the_engines(
    run: Callable[..., Running], artefact: Artefact, base: BaseModel, gradients: GradientEngine
) -> None:
    device = run().device()
    message, use = personal(artefact)
    texts = [("the cat sat", " on the mat"), ("the dog", " ran")]
    pairs = [(base.encode(p), base.encode_target(t)) for p, t in texts]
    candidates = [pb.Candidate(prompt=pb.Prompt(text=p), answer=t) for p, t in texts]
    scored = device.stub.Score(pb.ScoreRequest(candidates=candidates, shift=message), timeout=TIMEOUT)
    expected = gradients.score(pairs, use)
    assert [s.tokens for s in scored.scores] == [s.tokens for s in expected]
    assert np.allclose([s.log_likelihood for s in scored.scores], [s.log_likelihood for s in expected])
    examples = [pb.Example(prompt=pb.Prompt(text=p), target=t) for p, t in texts]
    got = device.stub.ComputeGradient(
        pb.ComputeGradientRequest(examples=examples, shift=message), timeout=TIMEOUT
    )
    gradient, spec = gradients.gradient(pairs, use), artefact.spec
    tensors = gradient_from_bytes(got.gradient, spec, spec.personal_rank)
    assert got.tokens == gradient.tokens
    assert got.loss == pytest.approx(gradient.loss, rel=1e-6)
    for (_, a), (_, b) in zip(tensors.named(), gradient.tensors.named(), strict=True):
        assert np.allclose(a, b, rtol=1e-5, atol=1e-7)
    assert tensors.norm() > 0


@pytest.mark.parametrize(
    ("call", "status", "code", "says"),
    [
        (lambda s, _: list(s.Generate(generate(""))), INVALID, "invalid_prompt", "empty"),
        (lambda s, _: list(s.Generate(generate("cat " * 300))), INVALID, "invalid_prompt", "at most"),
        (lambda s, _: list(s.Generate(generate(max_new_tokens=0))), INVALID, "invalid_input", "1 to"),
        (lambda s, _: list(s.Generate(generate(shift=pb.Shift()))), INVALID, "invalid_input", "mode"),
        (lambda s, p: list(s.Generate(generate(shift=pb.Shift(**{**p, "version": "0"})))),
         "FAILED_PRECONDITION", "shift_mismatch", "perfit update"),
        (lambda s, p: list(s.Generate(generate(shift=pb.Shift(**{**p, "personal": b"x"})))),
         INVALID, "invalid_tensors", "safetensors"),
        (lambda s, _: s.ComputeGradient(pb.ComputeGradientRequest(shift=BASE)),
         INVALID, "invalid_input", "personal mode"),
        (lambda s, p: s.ComputeGradient(pb.ComputeGradientRequest(shift=pb.Shift(**p))),
         INVALID, "invalid_input", "no examples"),
        (lambda s, _: s.Score(pb.ScoreRequest(shift=BASE)), INVALID, "invalid_input", "no examples"),
    ],
)  # fmt: skip
def test_refusals_carry_status_code_and_one_line(
    run: Callable[..., Running], artefact: Artefact, call: Any, status: str, code: str, says: str
) -> None:
    device = run().device()
    message, _ = personal(artefact)
    parts = {f.name: value for f, value in message.ListFields()}
    got_status, metadata, details = failure(lambda: call(device.stub, parts))
    assert (got_status, metadata) == (status, {"perfit-code": code})
    assert says in details
    assert "\n" not in details
    assert device.describe().cloud_id  # the channel is as good as before


# -- who may call --------------------------------------------------------------------------------


def describe(channel: grpc.Channel) -> Callable[[], object]:
    return lambda: pb_grpc.PersonalizationStub(channel).Describe(pb.DescribeRequest(), timeout=5)


def test_nobody_calls_without_a_certificate(run: Callable[..., Running]) -> None:
    running = run()
    roots = pem(running.authority.server_ca_der)
    channel = running.open(running.address, grpc.ssl_channel_credentials(roots))
    assert failure(describe(channel))[0] == "UNAVAILABLE"
    plain = grpc.insecure_channel(running.address)
    assert failure(describe(plain))[0] == "UNAVAILABLE"
    plain.close()


def test_certificates_of_another_cloud_are_refused(run: Callable[..., Running]) -> None:
    running, other = run(), run()
    foreign = other.device()
    assert foreign.describe().cloud_id == other.authority.cloud_id
    assert failure(describe(running.with_certificate(foreign.key, foreign.certificate).channel))[0] == (
        "UNAVAILABLE"
    )


def test_server_certificate_is_no_device(run: Callable[..., Running]) -> None:
    running = run()
    identity = running.authority.server_identity(["localhost"])
    credentials = grpc.ssl_channel_credentials(
        pem(running.authority.server_ca_der), identity.key_pem, identity.certificate_pem
    )
    assert failure(describe(running.open(running.address, credentials)))[0] == "UNAVAILABLE"


def test_device_trusts_its_own_cloud_only(run: Callable[..., Running]) -> None:
    running, other = run(), run()
    device = running.device()
    credentials = grpc.ssl_channel_credentials(
        pem(running.authority.server_ca_der), key_pem(device.key), pem(device.certificate)
    )
    assert failure(describe(running.open(other.address, credentials)))[0] == "UNAVAILABLE"


@pytest.mark.parametrize("root", ["server CA", "device CA"])
def test_device_cannot_pose_as_a_server(run: Callable[..., Running], root: str) -> None:
    running = run()
    key = new_key()
    der = running.authority.enroll(running.invite(), csr_of(key, name="localhost", san="localhost"))
    credentials = grpc.ssl_server_credentials([(key_pem(key), pem(der))])
    impostor = grpc.server(ThreadPoolExecutor(1))
    port = impostor.add_secure_port("127.0.0.1:0", credentials)
    impostor.start()
    device_root = running.authority.device_ca_pem
    roots = pem(running.authority.server_ca_der) if root == "server CA" else device_root
    channel = running.open(f"localhost:{port}", grpc.ssl_channel_credentials(roots))
    assert failure(describe(channel))[0] == "UNAVAILABLE"
    impostor.stop(0)


def test_expired_on_an_open_channel_then_renewed(run: Callable[..., Running]) -> None:
    running = run(certificate_seconds=3)
    device = running.device()
    device.describe()
    time.sleep(4)
    status, metadata, details = failure(device.describe)
    assert (status, metadata) == ("UNAUTHENTICATED", {"perfit-code": "certificate_expired"})
    assert "renewed" in details
    # A new handshake does not get that far.
    fresh = running.with_certificate(device.key, device.certificate)
    assert failure(describe(fresh.channel))[0] == "UNAVAILABLE"
    stub = enrol_grpc.EnrollmentStub(running.enrolment())
    nonce = stub.Challenge(enrol_pb.ChallengeRequest()).nonce
    csr = csr_of(device.key)
    request = enrol_pb.RenewLapsedRequest(
        certificate=device.certificate, nonce=nonce, csr=csr,
        signature=device.key.sign(b"perfit-renew-v1" + nonce + csr, ec.ECDSA(hashes.SHA256())),
    )  # fmt: skip
    renewed = running.with_certificate(device.key, stub.RenewLapsed(request).certificate)
    assert renewed.identity == device.identity
    renewed.describe()


def test_revoked_on_an_open_channel(run: Callable[..., Running]) -> None:
    running = run()
    device, other = running.device(), running.device()
    device.describe()
    second = Authority(running.config.state, certificate_seconds=9, lapse_seconds=9)  # as another process
    second.revoke(device.identity)
    status, metadata, _ = failure(device.describe)
    assert (status, metadata) == ("PERMISSION_DENIED", {"perfit-code": "identity_revoked"})
    assert failure(lambda: list(device.stub.Generate(generate())))[0] == "PERMISSION_DENIED"
    health = health_pb2_grpc.HealthStub(device.channel)
    assert failure(lambda: health.Check(health_pb2.HealthCheckRequest()))[0] == "PERMISSION_DENIED"
    renew = enrol_grpc.IdentityStub(device.channel)
    request = enrol_pb.RenewRequest(csr=csr_of(device.key))
    assert failure(lambda: renew.Renew(request))[0] == "PERMISSION_DENIED"
    other.describe()


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

    def __iter__(self) -> Iterator[Piece]:
        while self.go.acquire() and not self.cancelled.is_set():
            yield Piece("word ")


def test_revoked_between_messages_of_a_stream(run: Callable[..., Running]) -> None:
    drip = Drip()
    running = run(engine=drip)
    device = running.device()
    stream = device.stub.Generate(generate(), timeout=TIMEOUT)
    drip.go.release()
    assert next(stream).text == "word "
    running.authority.revoke(device.identity)
    drip.go.release()
    status, metadata, _ = failure(lambda: next(stream))
    assert (status, metadata) == ("PERMISSION_DENIED", {"perfit-code": "identity_revoked"})
    assert drip.cancelled.wait(TIMEOUT)


def test_expired_between_messages_of_a_stream(run: Callable[..., Running]) -> None:
    drip = Drip()
    device = run(engine=drip, certificate_seconds=3).device()
    stream = device.stub.Generate(generate(), timeout=TIMEOUT)
    drip.go.release()
    next(stream)
    time.sleep(4)
    drip.go.release()
    assert failure(lambda: next(stream))[:2] == ("UNAUTHENTICATED", {"perfit-code": "certificate_expired"})


# -- enrolment over the wire ---------------------------------------------------------------------


def test_enrolment_and_renewal(run: Callable[..., Running]) -> None:
    running = run()
    stub, key, secret = enrol_grpc.EnrollmentStub(running.enrolment()), new_key(), running.invite()
    request = enrol_pb.EnrollRequest(secret=secret, csr=csr_of(key))
    credentials = stub.Enroll(request, timeout=TIMEOUT)
    assert credentials == stub.Enroll(request, timeout=TIMEOUT)  # replies get lost
    assert credentials.server_ca == running.authority.server_ca_der
    assert (credentials.address, credentials.cloud_id) == (running.address, running.authority.cloud_id)
    device = running.with_certificate(key, credentials.certificate)
    device.describe()
    other = enrol_pb.EnrollRequest(secret=secret, csr=csr_of(new_key()))
    status, metadata, details = failure(lambda: stub.Enroll(other))
    assert (status, metadata) == ("PERMISSION_DENIED", {"perfit-code": "invite_refused"})
    assert "ask the operator" in details
    fresh = new_key()
    renewed = enrol_grpc.IdentityStub(device.channel).Renew(enrol_pb.RenewRequest(csr=csr_of(fresh)))
    again = running.with_certificate(fresh, renewed.certificate)
    assert again.identity == device.identity
    again.describe()
    bad = enrol_pb.RenewRequest(csr=b"x")
    assert failure(lambda: enrol_grpc.IdentityStub(device.channel).Renew(bad))[1] == {
        "perfit-code": "invalid_input"
    }


def test_enrolment_listener_serves_enrolment_only(run: Callable[..., Running]) -> None:
    running = run()
    assert failure(describe(running.enrolment()))[0] == "UNIMPLEMENTED"
    enrol = enrol_grpc.EnrollmentStub(running.device().channel)
    assert failure(lambda: enrol.Challenge(enrol_pb.ChallengeRequest()))[0] == "UNIMPLEMENTED"


# -- limits, leaving, failing --------------------------------------------------------------------


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


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.02)


def test_leaving_frees_the_place_in_the_engine(
    run: Callable[..., Running], generation: GenerationEngine
) -> None:
    device = run().device()
    stream = device.stub.Generate(generate(max_new_tokens=200), timeout=TIMEOUT)
    next(stream)
    stream.cancel()
    wait_for(lambda: generation.in_flight == 0)


def test_a_deadline_frees_the_place(run: Callable[..., Running]) -> None:
    drip = Drip()
    device = run(engine=drip).device()
    started = time.monotonic()
    assert failure(lambda: list(device.stub.Generate(generate(), timeout=0.5)))[0] == "DEADLINE_EXCEEDED"
    assert drip.cancelled.wait(5)
    assert time.monotonic() - started < 5


def test_calls_without_a_deadline_end_too(run: Callable[..., Running]) -> None:
    drip = Drip()
    device = run(engine=drip, call_seconds=1).device()
    stream = device.stub.Generate(generate())
    drip.go.release()
    next(stream)
    # The next piece never comes; the end used to be looked at only after a piece.
    started = time.monotonic()
    assert failure(lambda: next(stream))[:2] == ("DEADLINE_EXCEEDED", {"perfit-code": "too_slow"})
    assert time.monotonic() - started < 5
    assert drip.cancelled.is_set()


# -- floods --------------------------------------------------------------------------------------

# Frames of HTTP/2, to do what no gRPC client lets one do.
_SETTINGS, _HEADERS, _END_HEADERS = 0x4, 0x1, 0x4


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload


def header_only_calls(running: Running, address: str, path: str, count: int, device: Device | None) -> Any:
    """A connection on which `count` calls were begun that never send their message, nor any deadline."""
    fields = {
        ":method": "POST", ":scheme": "https", ":path": path, ":authority": "localhost",
        "content-type": "application/grpc", "te": "trailers",
    }  # fmt: skip
    # Literal header fields without indexing, RFC 7541 6.2.2.
    block = b"".join(
        b"\0" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode()
        for name, value in fields.items()
    )
    context = ssl.create_default_context(cadata=pem(running.authority.server_ca_der).decode())
    context.set_alpn_protocols(["h2"])
    if device is not None:
        file = running.config.state / "device.pem"
        file.write_bytes(key_pem(device.key) + pem(device.certificate))
        context.load_cert_chain(file)
    host, port = address.rsplit(":", 1)
    tls = context.wrap_socket(socket.create_connection((host, int(port)), TIMEOUT), server_hostname=host)
    tls.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(_SETTINGS, 0, 0))
    tls.sendall(b"".join(frame(_HEADERS, _END_HEADERS, 2 * i + 1, block) for i in range(count)))
    return tls


def test_calls_without_a_message_on_one_connection_starve_nobody(
    run: Callable[..., Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    # gRPC takes a thread for a call whose message has not come; these were as many as there are threads.
    monkeypatch.setattr("perfit_cloud.service.server._ENROL_AGE_SECONDS", 3)
    monkeypatch.setattr("perfit_cloud.service.server._GRACE_SECONDS", 1)
    running = run(calls=4)
    enrol, main = running.server.addresses.enrol_address, running.address
    hostile, honest = running.device(), running.device()
    enrol_flood = header_only_calls(running, enrol, "/perfit.v1.Enrollment/Challenge", 60, None)
    path = "/perfit.v1.Personalization/Describe"
    with (
        enrol_flood,
        header_only_calls(running, main, path, 60, hostile),
    ):
        time.sleep(0.5)
        stub = enrol_grpc.EnrollmentStub(running.enrolment())
        assert stub.Challenge(enrol_pb.ChallengeRequest(), timeout=2).nonce
        assert pb_grpc.PersonalizationStub(honest.channel).Describe(pb.DescribeRequest(), timeout=2).cloud_id
        # What the flood does hold is cut off when its connection is old.
        enrol_flood.settimeout(10)
        while enrol_flood.recv(65536):
            pass


def test_a_stream_outlives_the_age_of_its_connection(run: Callable[..., Running]) -> None:
    drip = Drip()
    device = run(engine=drip, call_seconds=3).device()  # and so old may a connection get
    device.describe()
    time.sleep(1.5)
    stream = device.stub.Generate(generate())
    for _ in range(5):
        drip.go.release()
        assert next(stream).text == "word "
        time.sleep(0.5)
    device.describe()  # over a new connection
    stream.cancel()


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


def test_passes_wait_in_a_bounded_line(run: Callable[..., Running]) -> None:
    slow = Slow()
    device = run(gradient_engine=slow, gradient_waiting=1).device()
    first = device.stub.Score.future(score(), timeout=TIMEOUT)
    assert slow.entered.wait(TIMEOUT)
    # One of two more finds room in the line, and stands there until its deadline.
    more = [device.stub.Score.future(score(), timeout=3) for _ in range(2)]
    outcomes = sorted(failure(call.result)[0] for call in more)
    assert outcomes == ["DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED"]
    slow.go.set()
    assert list(first.result().scores) == []


@pytest.mark.parametrize(
    "error", [RuntimeError("secret zebra 0.123"), KeyError("zebra"), ConfigError("zebra")]
)
def test_unknown_errors_tell_nothing(
    run: Callable[..., Running], caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    device = run(gradient_engine=Slow(error)).device()
    with caplog.at_level(logging.DEBUG):
        result = failure(lambda: device.stub.Score(score()))
    assert result == ("INTERNAL", {"perfit-code": "internal"}, "internal error")
    assert f"{type(error).__name__} at test_service.py:" in caplog.text
    assert "zebra" not in caplog.text
    assert "0.123" not in caplog.text


def test_errors_of_the_engine_keep_their_code(run: Callable[..., Running]) -> None:
    device = run(gradient_engine=Slow(InvalidTensors("they overflow"))).device()
    assert failure(lambda: device.stub.Score(score())) == (
        "INVALID_ARGUMENT", {"perfit-code": "invalid_tensors"}, "they overflow"
    )  # fmt: skip


def test_messages_are_bounded(run: Callable[..., Running]) -> None:
    device = run(message_bytes=300_000).device()
    request = generate("x" * 400_000)
    assert failure(lambda: list(device.stub.Generate(request)))[0] == "RESOURCE_EXHAUSTED"
    device.describe()


# -- the server's life ---------------------------------------------------------------------------


def test_health_and_drain(run: Callable[..., Running]) -> None:
    drip = Drip()
    running = run(engine=drip)
    device = running.device()
    ask = health_pb2.HealthCheckRequest
    serving = health_pb2.HealthCheckResponse.SERVING
    for channel, service in (
        (device.channel, "perfit.v1.Personalization"), (running.enrolment(), "perfit.v1.Enrollment")
    ):  # fmt: skip
        health = health_pb2_grpc.HealthStub(channel)
        assert health.Check(ask(service=service)).status == serving
        assert health.Check(ask()).status == serving
        assert failure(lambda h=health: h.Check(ask(service="x")))[0] == "NOT_FOUND"  # type: ignore[misc]
    watch = health_pb2_grpc.HealthStub(device.channel).Watch(ask(), timeout=TIMEOUT)
    assert next(watch).status == serving
    stream = device.stub.Generate(generate(), timeout=TIMEOUT)
    drip.go.release()
    next(stream)
    stopping = threading.Thread(target=running.server.stop, args=(TIMEOUT,))
    stopping.start()
    assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
    watch.cancel()
    drip.go.release()
    assert next(stream).text == "word "  # what runs may end
    late = running.device().channel
    assert failure(describe(late))[0] == "UNAVAILABLE"
    stream.cancel()
    stopping.join(TIMEOUT)
    assert not stopping.is_alive()


def test_a_port_that_is_taken_is_one_clear_error(run: Callable[..., Running]) -> None:
    running = run()
    with pytest.raises(ConfigError, match="cannot listen on"):
        run(address=running.address)


def test_addresses_are_left_for_invites(run: Callable[..., Running], tmp_path: Path) -> None:
    running = run(public_address="localhost:7", public_enrol_address="cloud.example:8")
    assert Addresses.load(running.config.state) == Addresses("localhost:7", "cloud.example:8")
    with pytest.raises(ConfigError, match="no server has run"):
        Addresses.load(tmp_path)


def test_one_server_for_a_state_folder(tmp_path: Path) -> None:
    with (
        only_server(tmp_path),
        pytest.raises(ConfigError, match="another perfit-cloud"),
        only_server(tmp_path),
    ):
        pass
    with only_server(tmp_path):
        pass


def test_server_certificate_is_replaced_without_a_restart(run: Callable[..., Running]) -> None:
    running = run(names=("cloud.example",))
    address = running.server.addresses.enrol_address

    def serial() -> str:
        context = ssl.create_default_context(cadata=pem(running.authority.server_ca_der).decode())
        context.set_alpn_protocols(["h2"])
        host, port = address.rsplit(":", 1)
        with (
            socket.create_connection((host, int(port)), TIMEOUT) as plain,
            context.wrap_socket(plain, server_hostname="cloud.example") as tls,
        ):
            return str((tls.getpeercert() or {})["serialNumber"])

    first = serial()
    assert serial() == first
    rotating = running.server._credentials
    rotating._identity = replace(rotating._identity, renew_at=0)
    assert serial() != first
    running.device().describe()
