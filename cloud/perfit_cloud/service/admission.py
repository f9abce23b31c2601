"""Who calls, whether they may, and what counts for them: asked before anything of a call is worked on.

gRPC checks a certificate once, at the handshake, and has no revocation list, so expiry and identity are
checked on every call and before every message of a stream. Of a sealed call the caller is who signed inside,
whoever opened the connection.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, NamedTuple, cast

import grpc
from cryptography import x509

from perfit_cloud.service.deadlines import Deadlines
from perfit_cloud.service.identity.certificates import identity_of, read_certificate
from perfit_cloud.service.limits import RateLimiter
from perfit_cloud.service.messages import next_message
from perfit_cloud.service.networks import forwarded_network, network_of
from perfit_cloud.service.sealing.calls import SealedCall
from perfit_cloud.service.settings import CallSettings, ListenerSettings, SealingSettings
from perfit_shared.errors import NotAuthenticated, PerfitError, SealBroken, SealRequired

__all__ = ["HEALTH_CHECK", "LEAVE", "Admission", "LetIn", "Method", "caller"]

# Answered even when there is no room for calls or the cloud is stopping.
HEALTH_CHECK = "/grpc.health.v1.Health/Check"
_DESCRIBE = "/perfit.v1.Personalization/Describe"  # answers in the clear: it has the keys to seal to
LEAVE = "/perfit.v1.Identity/Leave"  # its caller may hear that it is withdrawn by now
_OPENING_SECONDS = 10.0  # for the first message of a sealed call, before its caller is known


def caller(context: grpc.ServicerContext) -> x509.Certificate:
    """The certificate that the caller's channel was opened with. Raises NotAuthenticated without one."""
    pem = context.auth_context().get("x509_pem_cert")
    if not pem:
        raise NotAuthenticated("this call needs a device certificate; enrol with `perfit enroll`")
    return read_certificate(bytes(list(pem)[0]), pem=True)  # noqa: RUF015


class Method(NamedTuple):
    """An RPC as its service made it."""

    path: str  # "/perfit.v1.Personalization/Generate"
    name: str  # "Generate"
    behaviour: Callable[[Any, grpc.ServicerContext], Any]
    read: Callable[[bytes], Any]
    is_streamed_to: bool
    is_streamed_from: bool
    is_health: bool
    write: Callable[[Any], bytes]

    @property
    def is_session(self) -> bool:
        return self.is_streamed_to and self.is_streamed_from


class LetIn(NamedTuple):
    """A call that may be made."""

    sealed: SealedCall | None  # what opens its messages; None: they are in the clear
    certificate: x509.Certificate | None  # the caller's; None where anybody may call
    who: str  # pays: an identity, or a network
    messages: Iterator[bytes]


class Admission:
    """Of one listener. Without an authenticator (enrolment) anybody may call."""

    def __init__(self, listener: ListenerSettings, calls: CallSettings, deadlines: Deadlines) -> None:
        self._authenticator = listener.authenticator
        self._rate_limiter = listener.rate_limiter
        self._listener, self._calls, self._deadlines = listener, calls, deadlines

    def refused(self, reason: str) -> None:
        """Count a refusal."""
        self._calls.telemetry.refused(reason if self._authenticator else f"enrol_{reason}")

    def certificate(self, context: grpc.ServicerContext) -> x509.Certificate | None:
        """The caller's; None where anybody may call. Raises NotAuthenticated."""
        return None if self._authenticator is None else caller(context)

    def admitted(self, context: grpc.ServicerContext) -> AbstractContextManager[str]:
        """Who calls over this connection, as of a call that is not sealed. Raises what `let_in` does."""
        return self._admitted(context, self.certificate(context))

    @contextmanager
    def _admitted(self, context: grpc.ServicerContext, certificate: x509.Certificate | None) -> Iterator[str]:
        """The identity that calls, or its network. It pays for the call, and for a refusal, too.

        A refusal is not charged to the identity's own quota, or whoever holds a retired key could use it up.
        """
        who = self._network(context) if certificate is None else identity_of(certificate)
        rates = self.rates(certificate)
        try:
            if certificate is not None and self._authenticator is not None:
                self._authenticator.check(certificate)
        except PerfitError as error:
            rates.spend(f"{who} refused", "requests")
            self.refused(error.code)
            raise
        with rates.hold(who, "calls"):
            rates.spend(who, "requests")
            yield who

    def _network(self, context: grpc.ServicerContext) -> str:
        """Of a caller without a certificate, as the front or balancer says; else what it connected from."""
        sealing, told = self._listener.sealing, None
        if sealing is not None and sealing.caller_metadata:
            told = forwarded_network(context.invocation_metadata() or (), sealing.caller_metadata)
        return told or network_of(self._listener.peer_of(context.peer()))

    def rates(self, certificate: x509.Certificate | None) -> RateLimiter:
        """What counts for a caller. Behind a front all without a certificate have its address."""
        sealing = self._listener.sealing
        strangers = None if sealing is None else sealing.strangers
        return self._rate_limiter if certificate is not None or strangers is None else strangers

    def recheck(self, certificate: x509.Certificate | None) -> None:
        """Raises what the authenticator says of a caller who may not go on; counts it."""
        if certificate is None or self._authenticator is None:
            return
        try:
            self._authenticator.recheck(certificate)
        except PerfitError as error:
            self.refused(error.code)
            raise

    def _unknown_caller(
        self, method: Method, key_id: str, requests: Iterator[bytes], context: grpc.ServicerContext
    ) -> tuple[SealedCall | None, x509.Certificate | None, Iterator[bytes]]:
        """(what opens the messages, the caller's certificate, the messages) where TLS ends before us.

        It has to read a sealed call's first message to know its caller. Raises SealUnknown, SealBroken, and
        SealRequired.
        """
        sealing = self._listener.sealing
        if key_id and sealing is not None:
            with self._paid_opening(sealing, context):
                sealed, messages = self._opened(method, key_id, requests, context, seconds=_OPENING_SECONDS)
            return sealed, sealed.certificate, messages
        if not (method.is_health or method.path == _DESCRIBE):
            self.refused(SealRequired.code)
            raise SealRequired("this address takes sealed calls alone; `perfit config set sealed true`")
        return None, None, requests

    @contextmanager
    def _paid_opening(self, sealing: SealingSettings, context: grpc.ServicerContext) -> Iterator[None]:
        """A call that nobody has signed yet is paid by where it comes from, before its first message is read.

        It is given back when the call opens, so honest callers pay nothing. Raises Busy.
        """
        who, strangers = self._network(context), cast("RateLimiter", sealing.strangers)
        with strangers.hold(who, "openings"), sealing.openings.hold():
            strangers.spend(who, "openings")
            yield
            strangers.settle(who, "openings", paid=1, amount=0)

    def _opened(
        self,
        method: Method,
        key_id: str,
        requests: Iterator[bytes],
        context: grpc.ServicerContext,
        *,
        seconds: float,
        connection: x509.Certificate | None = None,
    ) -> tuple[SealedCall, Iterator[bytes]]:
        """(what opens the messages, the messages), when the first has come within `seconds`.

        `connection`: who opened it, and has to be who sealed. Raises SealUnknown, SealBroken.
        """
        sealing = cast("SealingSettings", self._listener.sealing)
        with self._deadlines.after(seconds, context.cancel), self._counted_refusals():
            first = next_message(requests)
            if first is None:
                raise SealBroken("the sealed call holds no message")
            sealed = sealing.calls.open(method.path, key_id, first)
            if connection is not None and connection != sealed.certificate:
                raise SealBroken("the call is sealed by another device than the connection's")
        return sealed, sealed.messages(first, requests)

    def _watched(
        self, method: Method, who: str, certificate: x509.Certificate | None, context: grpc.ServicerContext
    ) -> AbstractContextManager[None]:
        """Ends a call whose device is revoked: a stream on which nobody says anything would not notice."""
        if certificate is None or self._authenticator is None or method.path == LEAVE:
            return nullcontext()
        return self._authenticator.watched(who, context.cancel)

    @contextmanager
    def _counted_refusals(self) -> Iterator[None]:
        try:
            yield
        except PerfitError as error:
            self.refused(error.code)
            raise

    @contextmanager
    def let_in(
        self,
        method: Method,
        key_id: str,
        requests: Iterator[bytes],
        context: grpc.ServicerContext,
        *,
        seconds: float,
    ) -> Iterator[LetIn]:
        """A call that may be made, while it is. `seconds`: for a sealed call's first message.

        Over mutual TLS a caller counts before anything of a sealed call is read. Raises PerfitError.
        """
        sealing, sealed, certificate = self._listener.sealing, None, None
        with ExitStack() as held:
            if sealing is not None and sealing.strangers is not None:
                sealed, certificate, requests = self._unknown_caller(method, key_id, requests, context)
            else:
                certificate = self.certificate(context)
            who = held.enter_context(self._admitted(context, certificate))
            held.enter_context(self._watched(method, who, certificate, context))
            if not method.is_health:
                held.enter_context(self._calls.drain.call())
                held.enter_context(self._listener.limit.hold())
            if sealing is not None and key_id:
                if sealed is None:
                    sealed, requests = self._opened(
                        method, key_id, requests, context, seconds=seconds, connection=certificate
                    )
                with self._counted_refusals():
                    sealing.calls.take(sealed)
            yield LetIn(sealed, certificate, who, requests)
