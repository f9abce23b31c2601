"""What runs before every RPC: it authenticates, counts, and translates errors.

gRPC checks a certificate once, at the handshake, and has no revocation list. The interceptor checks expiry
and identity on every call and before every message of a stream.

It declares every method to gRPC as streaming both ways, over bytes; on the wire both are the same. So it
runs when a call's headers arrive, not when its message does: until then the call would hold a thread that
nobody counts or ends. It sees the size of a message before parsing it, and a reply counts as under way
until it is sent.
"""

from __future__ import annotations

import ipaddress
import logging
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, NamedTuple, cast

import grpc
from cryptography import x509

from perfit_cloud.engine.errors import error_location
from perfit_cloud.service.deadlines import Deadlines
from perfit_cloud.service.identity.certificates import identity_of, read_certificate
from perfit_cloud.service.limits import BYTES_A_TOKEN, MESSAGE_COPIES, Payment
from perfit_cloud.service.settings import CallSettings, ListenerSettings
from perfit_cloud.service.telemetry import CallOutcome
from perfit_shared.errors import Cancelled, InvalidInput, NotAuthenticated, PerfitError, to_status

__all__ = ["Call", "CallInterceptor", "caller", "public_error"]

_log = logging.getLogger(__name__)
# Answered even when there is no room for calls or the cloud is stopping.
_HEALTH_CHECK = "/grpc.health.v1.Health/Check"
# Refused: a watch never ends by itself, so a few hundred would take all calls; the library has no list.
_NOT_SERVED = ("/grpc.health.v1.Health/Watch", "/grpc.health.v1.Health/List")
_MESSAGE_SECONDS = 60.0  # for the one message of a call: the largest there may be, at 3 Mbit/s
_ROOM_SECONDS = 30.0  # that a message may wait for room
_LATE_SECONDS = 5.0  # past its time, before a call is cut off; it may end by itself and say why


def caller(context: grpc.ServicerContext) -> x509.Certificate:
    """The certificate that the caller's channel was opened with. Raises NotAuthenticated without one."""
    pem = context.auth_context().get("x509_pem_cert")
    if not pem:
        raise NotAuthenticated("this call needs a device certificate; enrol with `perfit enroll`")
    return read_certificate(bytes(list(pem)[0]), pem=True)  # noqa: RUF015


def network_of(context: grpc.ServicerContext) -> str:
    """Where a caller without a certificate calls from: an IPv4 address, or the /64 of an IPv6 one."""
    kind, _, rest = urllib.parse.unquote(context.peer()).partition(":")
    host = rest.rpartition(":")[0].strip("[]")
    if kind != "ipv6":
        return host
    address = ipaddress.IPv6Address(host)
    mapped = address.ipv4_mapped
    return str(mapped or ipaddress.IPv6Network((int(address) >> 64 << 64, 64)))


class Call:
    """A call that was let in: gRPC's context, whose it is, and what was paid for its messages so far."""

    def __init__(self, context: grpc.ServicerContext, device: str, payment: Payment) -> None:
        self.device = device  # identity, or network address where there is none
        self.payment = payment
        self._context = context

    def seconds_left(self, cap: float) -> float:
        """Until the call's deadline, at most `cap`."""
        remaining = self.time_remaining()
        return cap if remaining is None else min(cap, max(0.0, remaining))

    def __getattr__(self, name: str) -> Any:
        """Everything else is gRPC's."""
        return getattr(self._context, name)


class _Method(NamedTuple):
    """An RPC as its service made it."""

    path: str  # "/perfit.v1.Personalization/Generate"
    name: str  # "Generate"
    behaviour: Callable[[Any, grpc.ServicerContext], Any]
    read: Callable[[bytes], Any]
    is_streamed_to: bool
    is_streamed_from: bool
    is_health: bool

    @property
    def is_session(self) -> bool:
        return self.is_streamed_to and self.is_streamed_from


class CallInterceptor(grpc.ServerInterceptor):
    """Wraps every method of a server. Without an authenticator (enrolment) anybody may call."""

    def __init__(self, listener: ListenerSettings, calls: CallSettings) -> None:
        self._authenticator = listener.authenticator
        self._rate_limiter = listener.rate_limiter
        self._listener = listener
        self._calls = calls
        self._deadlines = Deadlines()

    def _refused(self, reason: str) -> None:
        """Count a refusal."""
        self._calls.telemetry.refused(reason if self._authenticator else f"enrol_{reason}")

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], grpc.RpcMethodHandler[Any, Any] | None],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        handler = continuation(handler_call_details)
        path = handler_call_details.method
        if handler is None or path in _NOT_SERVED:
            return grpc.stream_stream_rpc_method_handler(self._unknown)
        behaviours: tuple[Any, ...] = (
            handler.unary_unary,
            handler.unary_stream,
            handler.stream_unary,
            handler.stream_stream,
        )
        method = _Method(
            path=path,
            name=path.rpartition("/")[2],
            behaviour=next(behaviour for behaviour in behaviours if behaviour is not None),
            read=handler.request_deserializer or bytes,
            is_streamed_to=bool(handler.request_streaming),
            is_streamed_from=bool(handler.response_streaming),
            is_health=path == _HEALTH_CHECK,
        )

        def intercepted(requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[Any]:
            with self._calls.telemetry.call(method.name) as outcome, translated(context, path, outcome):
                yield from self._responses(method, requests, context)

        return grpc.stream_stream_rpc_method_handler(intercepted, None, handler.response_serializer)

    def _unknown(self, _: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        """An unknown method. It counts as a call, and gets the error that gRPC would give."""
        with self._calls.telemetry.call("unknown") as outcome:
            with translated(context, "unknown", outcome), self._admitted(context, self._certificate(context)):
                self._refused("method")
            outcome.status = grpc.StatusCode.UNIMPLEMENTED.name
        yield from ()
        context.abort(grpc.StatusCode.UNIMPLEMENTED, "Method not found!")

    def _certificate(self, context: grpc.ServicerContext) -> x509.Certificate | None:
        """The caller's; None where anybody may call. Raises NotAuthenticated."""
        return None if self._authenticator is None else caller(context)

    @contextmanager
    def _admitted(self, context: grpc.ServicerContext, certificate: x509.Certificate | None) -> Iterator[str]:
        """The identity that calls, or its network. It pays for the call, and for a refusal, too.

        A refusal is not charged to the identity's own quota, or whoever holds a retired key could use it up.
        """
        who = network_of(context) if certificate is None else identity_of(certificate)
        try:
            if certificate is not None and self._authenticator is not None:
                self._authenticator.check(certificate)
        except PerfitError as error:
            self._rate_limiter.spend(f"{who} refused", "requests")
            self._refused(error.code)
            raise
        with self._rate_limiter.hold(who, "calls"):
            self._rate_limiter.spend(who, "requests")
            yield who

    def _recheck(self, certificate: x509.Certificate | None) -> None:
        """Raises what the authenticator says of a caller who may not go on; counts it."""
        if certificate is None or self._authenticator is None:
            return
        try:
            self._authenticator.recheck(certificate)
        except PerfitError as error:
            self._refused(error.code)
            raise

    def _responses(
        self, method: _Method, requests: Iterator[bytes], context: grpc.ServicerContext
    ) -> Iterator[Any]:
        listener, calls = self._listener, self._calls
        certificate = self._certificate(context)
        with ExitStack() as held:
            held.callback(calls.ended)
            who = held.enter_context(self._admitted(context, certificate))
            if not method.is_health:
                held.enter_context(calls.drain.call())
                held.enter_context(listener.limit.hold())
            payment = Payment(self._rate_limiter, who, listener.tokens.get(method.name, 0))

            @contextmanager
            def arrive(data: bytes) -> Iterator[None]:
                self._recheck(certificate)
                taken = 0 if method.is_health else MESSAGE_COPIES * len(data)
                with (
                    self._rate_limiter.hold(who, "bytes", len(data)),
                    listener.room.hold(taken, _ROOM_SECONDS),
                ):
                    yield

            def read(data: bytes) -> Any:
                try:
                    payment.walked(listener.bounds.check(method.path, data, payment.charge))
                    return _parsed(method.read, data)
                except InvalidInput:
                    self._refused("message")
                    if listener.tokens:
                        self._rate_limiter.fine(who, "tokens", len(data) // BYTES_A_TOKEN)
                    raise

            if listener.tokens:
                self._rate_limiter.spend(who, "tokens", 0)  # a caller in debt sends nothing more
            messages = _Messages(requests, read, arrive)
            held.callback(messages.close)
            request: Any = messages
            if not method.is_streamed_to:
                with self._deadlines.after(_MESSAGE_SECONDS, context.cancel):
                    request = messages.only()
            seconds = calls.stream_seconds if method.is_session else calls.call_seconds
            # A caller who does not read holds the call in gRPC's send.
            held.enter_context(self._deadlines.after(seconds + _LATE_SECONDS, context.cancel))
            responses = method.behaviour(request, cast("grpc.ServicerContext", Call(context, who, payment)))
            for response in responses if method.is_streamed_from else (responses,):
                self._recheck(certificate)
                yield response


class _Messages(Iterator[Any]):
    """What a caller sends, as messages. Each counts as in flight until the next is read."""

    def __init__(
        self,
        requests: Iterator[bytes],
        read: Callable[[bytes], Any],
        arrive: Callable[[bytes], AbstractContextManager[None]],
    ) -> None:
        """`arrive` is entered when a message has come, and left when it was dealt with."""
        self._requests, self._read, self._arrive = requests, read, arrive
        self._lock = threading.Lock()  # one thread reads, another closes
        self._held = ExitStack()
        self._is_closed = False

    def __next__(self) -> Any:
        """Raises Cancelled, and what `arrive` and `read` raise."""
        with self._lock:
            self._held.close()
        try:
            data = next(self._requests)
        except grpc.RpcError as error:  # gRPC's word for it, with no code
            error.with_traceback(None)  # gRPC keeps the error, which keeps every frame that it passed
            raise Cancelled("the caller left") from None
        arrived = ExitStack()
        arrived.enter_context(self._arrive(data))  # not under the lock: it may wait for room
        with self._lock:
            if self._is_closed:
                arrived.close()
                raise Cancelled("the caller left")
            self._held = arrived
        return self._read(data)

    def only(self) -> Any:
        """The first. Raises InvalidInput when there is none."""
        for message in self:
            return message
        raise InvalidInput("the call holds no message")

    def close(self) -> None:
        with self._lock:
            self._is_closed = True
            self._held.close()


def _parsed(read: Callable[[bytes], Any], data: bytes) -> Any:
    """Raises InvalidInput on bytes that are no message."""
    try:
        return read(data)
    except Exception:
        raise InvalidInput("the cloud cannot read this message; update perfit") from None


@contextmanager
def translated(context: grpc.ServicerContext, method: str, outcome: CallOutcome) -> Iterator[None]:
    """Give the caller any error in one form: status, public message, code word, retry delay."""
    try:
        yield
        outcome.status = "OK"
    except Exception as error:
        status, code, message, retry_ms = public_error(error, method)
        outcome.status = status
        metadata = [("perfit-code", code)]
        if retry_ms:
            metadata.append(("perfit-retry-ms", str(retry_ms)))
        context.set_trailing_metadata(tuple(metadata))
        context.abort(grpc.StatusCode[status], message)


def public_error(error: Exception, method: str) -> tuple[str, str, str, int]:
    """What a caller sees of an error (`to_status`). The log gets the rest."""
    status = to_status(error)
    if status[0] == "INTERNAL":
        # A PerfitError holds type and line. The message of any other error may quote a prompt.
        where = str(error) if type(error) is PerfitError else error_location(error)
        _log.error("%s failed: %s", method, where)
    return status
