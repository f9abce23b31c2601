"""The RPCs: decode, ask the engine, encode. Errors go up to the guard, which tells them."""

# ruff: noqa: N802 - methods are named as the protos name them
from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import grpc

from perfit_cloud.service.calls import Answers, Gradients
from perfit_cloud.service.catalog import Catalog
from perfit_cloud.service.codec import (
    PromptReader,
    decode_shift,
    encode_chunk,
    encode_gradient,
    encode_scores,
    encode_seed,
    find_artefact,
)
from perfit_cloud.service.identity.authority import Authority
from perfit_cloud.service.interceptor import Call, caller
from perfit_cloud.service.limits import ConcurrencyLimit, Paid, RateLimiter
from perfit_cloud.service.streams.adapt import Adapting
from perfit_cloud.service.streams.ask import Asking
from perfit_cloud.service.telemetry import Telemetry
from perfit_shared.errors import Cancelled, InvalidInput, TooSlow
from perfit_shared.types import Mode
from perfit_shared.wire import enrollment_pb2 as enrol_pb
from perfit_shared.wire import enrollment_pb2_grpc as enrol_grpc
from perfit_shared.wire import personalization_pb2 as pb
from perfit_shared.wire import personalization_pb2_grpc as pb_grpc

__all__ = ["EnrollmentService", "IdentityService", "PersonalizationService"]


class PersonalizationService(pb_grpc.PersonalizationServicer):
    def __init__(
        self,
        served: Catalog,
        reader: PromptReader,
        *,
        description: pb.DescribeResponse,
        answers: Answers,
        gradients: Gradients,
        passes: ConcurrencyLimit,
        rate_limiter: RateLimiter,
        telemetry: Telemetry,
        asking: Asking,
        adapting: Adapting,
        call_seconds: float,
    ) -> None:
        self._served = served
        self._reader = reader
        self._description = description
        self._answers = answers
        self._gradients = gradients
        self._passes = passes
        self._rate_limiter = rate_limiter
        self._telemetry = telemetry
        self._asking = asking
        self._adapting = adapting
        self._call_seconds = call_seconds

    def Describe(self, request: pb.DescribeRequest, context: grpc.ServicerContext) -> pb.DescribeResponse:
        return self._description

    def FetchSeed(self, request: pb.FetchSeedRequest, context: grpc.ServicerContext) -> pb.FetchSeedResponse:
        return encode_seed(find_artefact(request.artefact, self._served.artefacts))

    def Generate(self, request: pb.GenerateRequest, call: Call) -> Iterator[pb.GenerateResponse]:
        shift = decode_shift(request.shift, self._served.artefacts)
        paid = call.payment.take()
        for chunk in self._answers.chunks(request, shift, call.device, call.add_callback, paid=paid):
            yield encode_chunk(chunk)

    def Ask(self, request_iterator: Iterator[pb.AskRequest], call: Call) -> Iterator[pb.AskResponse]:
        return self._asking.answers(request_iterator, call)

    def Score(self, request: pb.ScoreRequest, call: Call) -> pb.ScoreResponse:
        paid = call.payment.take()
        with paid.refunded(), self._place(call) as check:
            shift = decode_shift(request.shift, self._served.artefacts)
            pairs = self._settled(self._reader.candidates(request.candidates), paid)
            return encode_scores(self._gradients.score(pairs, shift, call.device, check))

    def ComputeGradient(self, request: pb.ComputeGradientRequest, call: Call) -> pb.ComputeGradientResponse:
        paid = call.payment.take()
        with paid.refunded(), self._place(call) as check:
            shift = decode_shift(request.shift, self._served.artefacts)
            if shift.mode is not Mode.PERSONAL:
                raise InvalidInput("a gradient is computed in personal mode")
            pairs = self._settled(self._reader.examples(request.examples), paid)
            found = self._gradients.gradient(pairs, shift, call.device, check)
            return encode_gradient(found, request.shift.personal)

    def Adapt(self, request_iterator: Iterator[pb.AdaptRequest], call: Call) -> Iterator[pb.AdaptResponse]:
        return self._adapting.steps(request_iterator, call)

    @contextmanager
    def _place(self, call: Call) -> Iterator[Callable[[], None]]:
        """A place among the calls whose passes take turns, and what to call before each pass.

        Raises Busy, Cancelled; what is to be called raises TooSlow and Cancelled.
        """
        left = threading.Event()
        end = time.monotonic() + call.seconds_left(self._call_seconds)

        def check() -> None:
            if left.is_set():
                raise Cancelled("the caller left")
            if time.monotonic() >= end:
                raise TooSlow("the cloud did not get to this call before its deadline; try again")

        with self._rate_limiter.hold(call.device, "gradients"):
            if not call.add_callback(left.set):
                raise Cancelled("the caller left")
            with self._passes.place():
                yield check

    def _settled(
        self, pairs: list[tuple[list[int], list[int]]], paid: Paid
    ) -> list[tuple[list[int], list[int]]]:
        """The same, paid for by their tokens. Raises Busy."""
        tokens = sum(len(prompt) + len(target) for prompt, target in pairs)
        paid.settle(tokens)
        self._telemetry.tokens("example", tokens)
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
        )
        return _credentials(self._authority, certificate, self._address)


class IdentityService(enrol_grpc.IdentityServicer):
    """On the mutual-TLS listener."""

    def __init__(self, authority: Authority, address: str) -> None:
        self._authority = authority
        self._address = address

    def Renew(self, request: enrol_pb.RenewRequest, context: grpc.ServicerContext) -> enrol_pb.Credentials:
        certificate = self._authority.renew(caller(context), request.csr)
        return _credentials(self._authority, certificate, self._address)


def _credentials(authority: Authority, certificate: bytes, address: str) -> enrol_pb.Credentials:
    return enrol_pb.Credentials(
        certificate=certificate,
        server_ca=authority.server_ca_der,
        address=address,
        cloud_id=authority.cloud_id,
    )
