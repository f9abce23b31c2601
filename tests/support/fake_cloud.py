"""A tiny cloud in this process: real stubs, real TLS on loopback, a quadratic in place of a model."""

from __future__ import annotations

import secrets
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import grpc
import numpy as np
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from perfit_cloud.service.identity import certificates
from perfit_cloud.service.identity.authority_keys import private_pem
from perfit_cloud.service.identity.certificates import CertificateAuthority
from perfit_shared.errors import InvalidPrompt, InviteRefused, NotAuthenticated, PerfitError, to_status
from perfit_shared.invites import Invite
from perfit_shared.shifts import LayerShift, ShiftSpec, ShiftTensors
from perfit_shared.tasks import TASKS, Task
from perfit_shared.wire import enrollment_pb2 as epb
from perfit_shared.wire import enrollment_pb2_grpc as eservices
from perfit_shared.wire import personalization_pb2 as pb
from perfit_shared.wire import personalization_pb2_grpc as services

SPEC = ShiftSpec(layers=(1, 2), positions="l7", collective_rank=4, personal_rank=2, hidden_size=16)
_LIFE = timedelta(days=1)  # of every certificate
_CLOCK = threading.Lock()  # one certificate at a time


def _abort(context: grpc.ServicerContext, error: PerfitError) -> None:
    status, code, message, delay = to_status(error)
    context.set_trailing_metadata((("perfit-code", code), ("perfit-retry-ms", str(delay))))
    context.abort(grpc.StatusCode[status], message)


class FakeCloud:
    """Loss of tensors on an example: a quadratic around a target that the example's text picks."""

    def __init__(self) -> None:
        self.cloud_id = secrets.token_hex(8)
        self.seed = ShiftTensors.identity(SPEC, SPEC.personal_rank, 1)
        self.invites: dict[bytes, bytes] = {}  # secret → CSR's public key
        self.refuses: Callable[[str], bool] = lambda text: "too long" in text  # `text_of` prompts
        self.fail: Callable[[str], PerfitError | None] = lambda method: None
        self.calls: list[str] = []
        self.seconds: dict[str, float | None] = {}  # method → its deadline, as it came
        self.certificate_age = timedelta(minutes=1)
        self.server_age = timedelta(minutes=1)  # of the server's certificate, which lives a day
        self.answer = "Hello world"
        self.prompt_tokens, self.adapt_tokens = 512, 0  # limits; 0: none
        self.pause = 0.0  # seconds between pieces
        self.cancelled = threading.Event()
        self.version = "v1"
        self.tasks = ["news_headline"]
        self.own_tasks: dict[str, Task] = {}  # of tasks that are not perfit's, or read otherwise
        self.prompts: list[pb.Prompt] = []  # of Generate, as they came
        self.samplings: list[pb.Sampling] = []  # likewise
        self.personal: list[bytes] = []  # tensors of Generate, as they came
        self.scored: list[tuple[pb.ShiftMode, pb.Prompt]] = []  # of Score, as they came
        self.learned: list[pb.Example] = []  # of ComputeGradient, as they came
        self.gradient: Callable[[ShiftTensors], bytes] = ShiftTensors.to_bytes
        self.seed_bytes: bytes | None = None
        self.communities: list[bytes] = []  # their seeds
        with tempfile.TemporaryDirectory() as folder:
            self.server_ca = CertificateAuthority.open(Path(folder, "server.pem"), "server ca")
            self.device_ca = CertificateAuthority.open(Path(folder, "device.pem"), "device ca")
        self.nonce = b""
        self.servers: list[grpc.Server] = []
        self.address = self.enrolment_address = "127.0.0.1:0"
        self.start()

    def start(self) -> None:
        """Both listeners; on the same ports as before when there were any."""
        key = ec.generate_private_key(ec.SECP256R1())
        with _clock_behind(self.server_age):
            leaf = self.server_ca.issue_server(key.public_key(), ["localhost", "127.0.0.1"], _LIFE)
        pair = [(private_pem(key), leaf.public_bytes(Encoding.PEM))]
        mutual = grpc.ssl_server_credentials(pair, self.device_ca.pem, require_client_auth=True)
        plain = grpc.ssl_server_credentials(pair)
        main = grpc.server(futures.ThreadPoolExecutor(16))
        services.add_PersonalizationServicer_to_server(Personalization(self), main)
        eservices.add_IdentityServicer_to_server(Identity(self), main)
        enrol = grpc.server(futures.ThreadPoolExecutor(4))
        eservices.add_EnrollmentServicer_to_server(Enrollment(self), enrol)
        self.address = f"127.0.0.1:{main.add_secure_port(self.address, mutual)}"
        self.enrolment_address = f"127.0.0.1:{enrol.add_secure_port(self.enrolment_address, plain)}"
        self.servers = [main, enrol]
        for server in self.servers:
            server.start()

    def stop(self) -> None:
        for server in self.servers:
            server.stop(None).wait()

    def invite(self, *, expires_in: float = 3600.0) -> Invite:
        secret = secrets.token_bytes(32)
        self.invites[secret] = b""
        return Invite(self.enrolment_address, self.server_ca.der, int(time.time() + expires_in), secret)

    def credentials(self, csr: bytes) -> epb.Credentials:
        key = certificates.read_csr(csr)
        with _clock_behind(self.certificate_age):
            certificate = self.device_ca.issue_device(key, "d", _LIFE, generation=1)
        return epb.Credentials(
            certificate=certificate.public_bytes(Encoding.DER),
            server_ca=self.server_ca.der,
            address=self.address,
            cloud_id=self.cloud_id,
        )

    def check(self, method: str, context: grpc.ServicerContext) -> None:
        self.calls.append(method)
        self.seconds[method] = context.time_remaining()
        error = self.fail(method)
        if error is not None:
            _abort(context, error)

    def tensors(self, shift: pb.Shift, context: grpc.ServicerContext) -> ShiftTensors:
        if shift.mode != pb.SHIFT_MODE_PERSONAL:
            return ShiftTensors.identity(SPEC, SPEC.personal_rank, 99)
        try:
            return ShiftTensors.from_bytes(shift.personal, SPEC, SPEC.personal_rank)
        except PerfitError as error:
            _abort(context, error)
            raise


def quadratic(tensors: ShiftTensors, pull: float) -> tuple[float, ShiftTensors]:
    """Loss and gradient of ½‖W − pull‖² + ½‖b − pull‖² + ½‖R − R₀‖², averaged over elements."""
    goal = ShiftTensors.identity(SPEC, SPEC.personal_rank, 7)
    loss, layers, size = 0.0, {}, SPEC.personal_parameters()
    for layer, shift in tensors.layers.items():
        parts = (shift.rotation - goal.layers[layer].rotation, shift.source - pull, shift.bias - pull)
        loss += sum(float((part**2).sum()) for part in parts) / 2
        layers[layer] = LayerShift(*(np.asarray(part, np.float32) / np.float32(size) for part in parts))
    return loss / size, ShiftTensors(layers)


def text_of(prompt: pb.Prompt) -> str:
    """All that a model reads of it, a turn a line."""
    return prompt.text or "\n".join(message.content for message in prompt.chat.messages)


def pull_of(text: str) -> float:
    return 0.2 + (sum(text.encode()) % 7) / 100


@contextmanager
def _clock_behind(age: timedelta) -> Iterator[None]:
    """Certificates that are made in the block are as old as this, or of the future where it is negative."""
    clock = SimpleNamespace(time=lambda: time.time() - age.total_seconds())
    with _CLOCK, mock.patch.object(certificates, "time", clock):
        yield


class Personalization(services.PersonalizationServicer):
    def __init__(self, cloud: FakeCloud) -> None:
        self.cloud = cloud

    def Describe(self, request: Any, context: Any) -> pb.DescribeResponse:  # noqa: N802
        self.cloud.check("Describe", context)
        artefacts = [
            pb.Artefact(
                name=name,
                version=self.cloud.version,
                task_json=(self.cloud.own_tasks.get(name) or TASKS[name].resolved(False)).to_json(),
                learning_rate=0.01,
                epochs=3,
                batch_size=4,
                communities=len(self.cloud.communities),
                spec=pb.ShiftSpec(
                    layers=SPEC.layers,
                    positions=SPEC.positions,
                    collective_rank=SPEC.collective_rank,
                    personal_rank=SPEC.personal_rank,
                    hidden_size=SPEC.hidden_size,
                ),
            )
            for name in self.cloud.tasks
        ]
        limits = pb.Limits(
            prompt_tokens=self.cloud.prompt_tokens,
            new_tokens=64,
            examples=3,
            message_bytes=1 << 20,
            questions=4,
            adapt_tokens=self.cloud.adapt_tokens,
        )
        return pb.DescribeResponse(
            base_model="fake",
            fingerprint="f" * 64,
            artefacts=artefacts,
            limits=limits,
            cloud_id=self.cloud.cloud_id,
        )

    def FetchSeed(self, request: Any, context: Any) -> pb.FetchSeedResponse:  # noqa: N802
        self.cloud.check("FetchSeed", context)
        return pb.FetchSeedResponse(
            version=self.cloud.version,
            seed=self.cloud.seed_bytes or self.cloud.seed.to_bytes(),
            communities=self.cloud.communities,
        )

    def Generate(self, request: Any, context: Any) -> Iterator[pb.GenerateResponse]:  # noqa: N802
        self.cloud.check("Generate", context)
        self.cloud.prompts.append(request.prompt)
        self.cloud.samplings.append(request.sampling)
        self.cloud.personal.append(request.shift.personal)
        self.cloud.tensors(request.shift, context)
        if self.cloud.refuses(text_of(request.prompt)):
            _abort(context, InvalidPrompt("the prompt is longer than 512 tokens; shorten it"))
        mode = pb.ShiftMode.Name(request.shift.mode).rpartition("_")[2].lower()
        whole = False
        try:
            for word in f" {self.cloud.answer} {mode}".split(" "):
                time.sleep(self.cloud.pause)
                if not context.is_active():
                    return
                yield pb.GenerateResponse(text=f"{word} ")
            yield pb.GenerateResponse(finish=pb.FINISH_REASON_END, prompt_tokens=5, answer_tokens=3)
            whole = True
        finally:  # gRPC drops a generator at a yield when the caller leaves just then
            if not whole:
                self.cloud.cancelled.set()

    def Ask(self, requests: Any, context: Any) -> Iterator[pb.AskResponse]:  # noqa: N802
        """One answer after the other; `fail("Question")` turns a question away."""
        self.cloud.check("Ask", context)
        shift = next(requests).shift
        self.cloud.tensors(shift, context)
        for request in requests:
            question = request.question
            self.cloud.calls.append("Question")
            error = self.cloud.fail("Question")
            if self.cloud.refuses(text_of(question.prompt)):
                error = InvalidPrompt("the prompt is longer than 512 tokens; shorten it")
            if error is not None:
                _, code, message, delay = to_status(error)
                failure = pb.Failure(code=code, message=message, retry_ms=delay)
                yield pb.AskResponse(number=question.number, failure=failure)
                continue
            generate = pb.GenerateRequest(prompt=question.prompt, shift=shift, sampling=question.sampling)
            for part in self.Generate(generate, context):
                yield pb.AskResponse(number=question.number, part=part)

    def Score(self, request: Any, context: Any) -> pb.ScoreResponse:  # noqa: N802
        self.cloud.check("Score", context)
        self.cloud.scored += [(request.shift.mode, candidate.prompt) for candidate in request.candidates]
        tensors = self.cloud.tensors(request.shift, context)
        if any(self.cloud.refuses(text_of(c.prompt)) for c in request.candidates):
            _abort(context, InvalidPrompt("an example is longer than 512 tokens; shorten it"))
        losses = [quadratic(tensors, pull_of(text_of(c.prompt)))[0] for c in request.candidates]
        return pb.ScoreResponse(scores=[pb.CandidateScore(log_likelihood=-4 * x, tokens=4) for x in losses])

    def ComputeGradient(self, request: Any, context: Any) -> pb.ComputeGradientResponse:  # noqa: N802
        self.cloud.check("ComputeGradient", context)
        self.cloud.learned += request.examples
        tensors = self.cloud.tensors(request.shift, context)
        if any(self.cloud.refuses(text_of(e.prompt)) for e in request.examples):
            _abort(context, InvalidPrompt("an example is longer than 512 tokens; shorten it"))
        pulls = [pull_of(text_of(e.prompt)) for e in request.examples]
        loss = float(np.mean([quadratic(tensors, pull)[0] for pull in pulls]))
        gradient = quadratic(tensors, float(np.mean(pulls)))[1]
        return pb.ComputeGradientResponse(
            loss=loss, tokens=4 * len(pulls), gradient=self.cloud.gradient(gradient)
        )


class Enrollment(eservices.EnrollmentServicer):
    def __init__(self, cloud: FakeCloud) -> None:
        self.cloud = cloud

    def Enroll(self, request: Any, context: Any) -> epb.Credentials:  # noqa: N802
        self.cloud.check("Enroll", context)
        key = certificates.read_csr(request.csr)
        spki = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        if request.secret not in self.cloud.invites or self.cloud.invites[request.secret] not in (b"", spki):
            _abort(context, InviteRefused("this invite was used already; ask the operator for a new one"))
        self.cloud.invites[request.secret] = spki
        return self.cloud.credentials(request.csr)

    def Challenge(self, request: Any, context: Any) -> epb.ChallengeResponse:  # noqa: N802
        self.cloud.check("Challenge", context)
        self.cloud.nonce = secrets.token_bytes(32)
        return epb.ChallengeResponse(nonce=self.cloud.nonce)

    def RenewLapsed(self, request: Any, context: Any) -> epb.Credentials:  # noqa: N802
        self.cloud.check("RenewLapsed", context)
        key = certificates.read_certificate(request.certificate).public_key()
        if not isinstance(key, ec.EllipticCurvePublicKey) or request.nonce != self.cloud.nonce:
            _abort(context, NotAuthenticated("wrong nonce"))
        key.verify(  # type: ignore[union-attr]
            request.signature, b"perfit-renew-v1" + request.nonce + request.csr, ec.ECDSA(hashes.SHA256())
        )
        self.cloud.certificate_age = timedelta(minutes=1)
        return self.cloud.credentials(request.csr)


class Identity(eservices.IdentityServicer):
    def __init__(self, cloud: FakeCloud) -> None:
        self.cloud = cloud

    def Renew(self, request: Any, context: Any) -> epb.Credentials:  # noqa: N802
        self.cloud.check("Renew", context)
        self.cloud.certificate_age = timedelta(minutes=1)
        return self.cloud.credentials(request.csr)

    def Leave(self, request: Any, context: Any) -> epb.LeaveResponse:  # noqa: N802
        self.cloud.check("Leave", context)
        return epb.LeaveResponse()
