"""The RPCs: decode, ask the engine, encode. Errors go up to the interceptor, which translates them."""

# ruff: noqa: N802 - methods are named as the protos name them
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import grpc
from cryptography import x509

from perfit_cloud.engine.gradients.batch import Pair
from perfit_cloud.engine.gradients.scheduler import GradientScheduler
from perfit_cloud.service.calls import Answers
from perfit_cloud.service.codec import (
    decode_shift,
    encode_chunk,
    encode_gradient,
    encode_scores,
    encode_seed,
    find_artefact,
)
from perfit_cloud.service.identity.authenticator import Authenticator
from perfit_cloud.service.identity.authority import Authority
from perfit_cloud.service.identity.server_authority import SealingKeyRequest, ServerAuthority
from perfit_cloud.service.interceptor import Call
from perfit_cloud.service.limits import ConcurrencyLimit, Paid
from perfit_cloud.service.sealing.keys import ReplicaKeys
from perfit_cloud.service.settings import ModelSettings
from perfit_cloud.service.streams.adapt import Adapting
from perfit_cloud.service.streams.ask import Asking
from perfit_cloud.service.waiting import CallWait
from perfit_shared.errors import Cancelled, InvalidInput, NotAuthenticated, NotHere
from perfit_shared.types import Mode
from perfit_shared.wire import enrollment_pb2 as enrol_pb
from perfit_shared.wire import enrollment_pb2_grpc as enrol_grpc
from perfit_shared.wire import personalization_pb2 as pb
from perfit_shared.wire import personalization_pb2_grpc as pb_grpc

__all__ = ["EnrollmentService", "IdentityService", "PersonalizationService", "ServersService"]


class PersonalizationService(pb_grpc.PersonalizationServicer):
    def __init__(
        self,
        model: ModelSettings,
        *,
        roles: tuple[str, ...],
        description: pb.DescribeResponse,
        sealing_keys: ReplicaKeys | None,
        answers: Answers,
        scheduler: GradientScheduler,
        passes: ConcurrencyLimit,
        asking: Asking,
        adapting: Adapting,
    ) -> None:
        self._model = model
        self._catalog = model.catalog
        self._reader = model.reader
        self._roles = roles
        self._description = description
        self._sealing_keys = sealing_keys
        self._answers = answers
        self._scheduler = scheduler
        self._passes = passes
        self._asking = asking
        self._adapting = adapting

    def Describe(self, request: pb.DescribeRequest, context: grpc.ServicerContext) -> pb.DescribeResponse:
        if self._sealing_keys is None:
            return self._description
        described = pb.DescribeResponse(sealing_keys=self._sealing_keys.published())
        described.MergeFrom(self._description)
        return described

    def FetchSeed(self, request: pb.FetchSeedRequest, context: grpc.ServicerContext) -> pb.FetchSeedResponse:
        return encode_seed(find_artefact(request.artefact, self._catalog.artefacts))

    def Generate(self, request: pb.GenerateRequest, call: Call) -> Iterator[pb.GenerateResponse]:
        self._check_role("answers")
        shift = decode_shift(request.shift, self._catalog.artefacts)
        paid = call.payment.take()
        for chunk in self._answers.chunks(request, shift, call.device, call.add_callback, paid=paid):
            yield encode_chunk(chunk)

    def Ask(self, request_iterator: Iterator[pb.AskRequest], call: Call) -> Iterator[pb.AskResponse]:
        self._check_role("answers")
        return self._asking.answers(request_iterator, call)

    def Score(self, request: pb.ScoreRequest, call: Call) -> pb.ScoreResponse:
        paid = call.payment.take()
        with paid.refunded(), self._slot(call) as wait:
            shift = decode_shift(request.shift, self._catalog.artefacts)
            pairs = self._settled(self._reader.candidates(request.candidates), paid)
            with self._scheduler.open_stateless(pairs, shift, left=wait.left, owner=call.device) as session:
                scores = wait.result(self._scheduler.score(session.whole))
            return encode_scores(scores)

    def ComputeGradient(self, request: pb.ComputeGradientRequest, call: Call) -> pb.ComputeGradientResponse:
        self._check_role("updates")
        paid = call.payment.take()
        with paid.refunded(), self._slot(call) as wait:
            shift = decode_shift(request.shift, self._catalog.artefacts)
            if shift.mode is not Mode.PERSONAL:
                raise InvalidInput("a gradient is computed in personal mode")
            pairs = self._settled(self._reader.examples(request.examples), paid)
            with self._scheduler.open_stateless(pairs, shift, left=wait.left, owner=call.device) as session:
                found = wait.result(self._scheduler.submit(session.whole))
            return encode_gradient(found, request.shift.personal)

    def Adapt(self, request_iterator: Iterator[pb.AdaptRequest], call: Call) -> Iterator[pb.AdaptResponse]:
        self._check_role("updates")
        return self._adapting.steps(request_iterator, call)

    def _check_role(self, role: str) -> None:
        """Raises NotHere. Scores belong to both: a gate needs them, too."""
        if role not in self._roles:
            raise NotHere(f"this server gives no {role}; another address of this cloud does")

    @contextmanager
    def _slot(self, call: Call) -> Iterator[CallWait]:
        """A slot among the calls that wait for the scheduler. Raises Busy, Cancelled."""
        with self._model.rate_limiter.hold(call.device, "gradients"), self._passes.hold():
            wait = CallWait(
                call,
                call.seconds_left(self._model.calls.call_seconds),
                too_slow="the cloud did not get to this call before its deadline; try again",
            )
            try:
                yield wait
            except InvalidInput:  # the session was closed because the caller left
                if wait.left.is_set():
                    raise Cancelled("the caller left") from None
                raise

    def _settled(self, pairs: list[Pair], paid: Paid) -> list[Pair]:
        """The same, paid for by their tokens. Raises Busy."""
        tokens = sum(len(prompt) + len(target) for prompt, target in pairs)
        paid.settle(tokens)
        self._model.calls.telemetry.tokens("example", tokens)
        return pairs


class EnrollmentService(enrol_grpc.EnrollmentServicer):
    """On the listener without client certificates."""

    def __init__(self, authority: Authority, address: str) -> None:
        self._authority = authority
        self._address = address

    def Enroll(self, request: enrol_pb.EnrollRequest, context: grpc.ServicerContext) -> enrol_pb.Credentials:
        certificate = self._authority.enroll(request.secret, request.csr)
        return _credentials(self._authority, certificate, self._address)

    def Challenge(
        self, request: enrol_pb.ChallengeRequest, context: grpc.ServicerContext
    ) -> enrol_pb.ChallengeResponse:
        return enrol_pb.ChallengeResponse(nonce=self._authority.challenge())

    def RenewLapsed(
        self, request: enrol_pb.RenewLapsedRequest, context: grpc.ServicerContext
    ) -> enrol_pb.Credentials:
        certificate = self._authority.renew_lapsed(
            certificate=request.certificate,
            nonce=request.nonce,
            signature=request.signature,
            csr=request.csr,
            is_not_here=request.not_here,
        )
        return _credentials(self._authority, certificate, self._address)


class ServersService(enrol_grpc.ServersServicer):
    """Beside EnrollmentService."""

    def __init__(self, servers: ServerAuthority) -> None:
        self._servers = servers

    def RenewServer(
        self, request: enrol_pb.RenewServerRequest, context: grpc.ServicerContext
    ) -> enrol_pb.ServerCredentials:
        issued = self._servers.renew(
            certificate=request.certificate, nonce=request.nonce, signature=request.signature, csr=request.csr
        )
        return enrol_pb.ServerCredentials(
            certificate=issued.certificate, server_ca=issued.server_cas, device_ca=issued.device_cas
        )

    def CertifySealingKey(
        self, request: enrol_pb.CertifySealingKeyRequest, context: grpc.ServicerContext
    ) -> enrol_pb.CertifySealingKeyResponse:
        certificate = self._servers.certify(
            SealingKeyRequest(request.x25519, request.mlkem, request.key_id, request.life_seconds),
            certificate=request.certificate,
            nonce=request.nonce,
            signature=request.signature,
        )
        return enrol_pb.CertifySealingKeyResponse(certificate=certificate)


class IdentityService(enrol_grpc.IdentityServicer):
    """On the mutual-TLS listener."""

    def __init__(self, authenticator: Authenticator, authority: Authority | None, address: str) -> None:
        """Without an authority, this process renews nothing."""
        self._authenticator, self._authority = authenticator, authority
        self._address = address

    def Renew(self, request: enrol_pb.RenewRequest, call: Call) -> enrol_pb.Credentials:
        if self._authority is None:
            raise NotHere("this server issues no certificates; renew where you enrolled")
        certificate = self._authority.renew(_certificate(call), request.csr)
        return _credentials(self._authority, certificate, self._address)

    def Leave(self, request: enrol_pb.LeaveRequest, call: Call) -> enrol_pb.LeaveResponse:
        self._authenticator.leave(_certificate(call))
        return enrol_pb.LeaveResponse()


def _certificate(call: Call) -> x509.Certificate:
    if call.certificate is None:
        raise NotAuthenticated("this call needs a device certificate; enrol with `perfit enroll`")
    return call.certificate


def _credentials(authority: Authority, certificate: bytes, address: str) -> enrol_pb.Credentials:
    return enrol_pb.Credentials(
        certificate=certificate,
        server_ca=authority.server_ca_der,
        other_server_ca=authority.other_server_ca_der,
        address=address,
        cloud_id=authority.cloud_id,
    )
