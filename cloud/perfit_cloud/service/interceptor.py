"""What runs before every RPC: it lets callers in (`admission`), counts, and translates errors.

It declares every method to gRPC as streaming both ways, over bytes; on the wire both are the same. So it
runs when a call's headers arrive, not when its message does: until then the call would hold a thread that
nobody counts or ends. It sees the size of a message before parsing it, and a reply counts as under way
until it is sent.

Of a sealed call (`service/sealing`) it opens every message.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import grpc
from cryptography import x509

from perfit_cloud.engine.errors import error_location
from perfit_cloud.service.admission import HEALTH_CHECK, LEAVE, Admission, Method
from perfit_cloud.service.deadlines import Deadlines
from perfit_cloud.service.limits import BYTES_A_TOKEN, MESSAGE_COPIES, Payment
from perfit_cloud.service.messages import Messages, parsed
from perfit_cloud.service.settings import CallSettings, ListenerSettings
from perfit_cloud.service.telemetry import CallOutcome
from perfit_shared.errors import InvalidInput, PerfitError, to_status
from perfit_shared.sealing.calls import KEY_METADATA

__all__ = ["Call", "CallInterceptor", "public_error"]

_log = logging.getLogger(__name__)
# Refused: a watch never ends by itself, so a few hundred would take all calls; the library has no list.
_NOT_SERVED = ("/grpc.health.v1.Health/Watch", "/grpc.health.v1.Health/List")
_MESSAGE_SECONDS = 60.0  # for the one message of a call: the largest there may be, at 3 Mbit/s
_ROOM_SECONDS = 30.0  # that a message may wait for room
_LATE_SECONDS = 5.0  # past its time, before a call is cut off; it may end by itself and say why


class Call:
    """A call that was let in: gRPC's context, whose it is, and what was paid for its messages so far."""

    def __init__(
        self,
        context: grpc.ServicerContext,
        device: str,
        payment: Payment,
        certificate: x509.Certificate | None,
    ) -> None:
        self.device = device  # identity, or network address where there is none
        self.payment = payment
        self.certificate = certificate  # the device's; None where anybody may call
        self._context = context

    def seconds_left(self, cap: float) -> float:
        """Until the call's deadline, at most `cap`."""
        remaining = self.time_remaining()
        return cap if remaining is None else min(cap, max(0.0, remaining))

    def __getattr__(self, name: str) -> Any:
        """Everything else is gRPC's."""
        return getattr(self._context, name)


class CallInterceptor(grpc.ServerInterceptor):
    """Wraps every method of a server. Without an authenticator (enrolment) anybody may call."""

    def __init__(self, listener: ListenerSettings, calls: CallSettings) -> None:
        self._listener = listener
        self._calls = calls
        self._deadlines = Deadlines()
        self._admission = Admission(listener, calls, self._deadlines)

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
        method = Method(
            path=path,
            name=path.rpartition("/")[2],
            behaviour=next(behaviour for behaviour in behaviours if behaviour is not None),
            read=handler.request_deserializer or bytes,
            is_streamed_to=bool(handler.request_streaming),
            is_streamed_from=bool(handler.response_streaming),
            is_health=path == HEALTH_CHECK,
            write=handler.response_serializer or bytes,
        )
        key_id = sealed_to(handler_call_details)

        def intercepted(requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
            with self._calls.telemetry.call(method.name) as outcome, translated(context, path, outcome):
                yield from self._responses(method, key_id, requests, context)

        return grpc.stream_stream_rpc_method_handler(intercepted)

    def _unknown(self, _: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        """An unknown method. It counts as a call, and gets the error that gRPC would give."""
        with self._calls.telemetry.call("unknown") as outcome:
            with translated(context, "unknown", outcome), self._admission.admitted(context):
                self._admission.refused("method")
            outcome.status = grpc.StatusCode.UNIMPLEMENTED.name
        yield from ()
        context.abort(grpc.StatusCode.UNIMPLEMENTED, "Method not found!")

    def _most_seconds(self, method: Method) -> float:
        """Of a call, before it is cut off."""
        return _LATE_SECONDS + (self._calls.stream_seconds if method.is_session else self._calls.call_seconds)

    def _responses(
        self, method: Method, key_id: str, requests: Iterator[bytes], context: grpc.ServicerContext
    ) -> Iterator[bytes]:
        listener, calls = self._listener, self._calls
        with ExitStack() as held:
            held.callback(calls.ended)
            let_in = self._admission.let_in(method, key_id, requests, context, seconds=_MESSAGE_SECONDS)
            sealed, certificate, who, requests = held.enter_context(let_in)
            rates = self._admission.rates(certificate)
            payment = Payment(rates, who, listener.tokens.get(method.name, 0))

            @contextmanager
            def arrive(data: bytes) -> Iterator[None]:
                self._admission.recheck(certificate)
                size = min(len(data), listener.message_bytes)  # what seals a message comes on top
                taken = 0 if method.is_health else MESSAGE_COPIES * size
                with rates.hold(who, "bytes", size), listener.room.hold(taken, _ROOM_SECONDS):
                    yield

            def read(data: bytes) -> Any:
                if sealed is not None:
                    opened = sealed.open(data, is_only=not method.is_streamed_to)
                    if opened is None:
                        return None
                    data = opened
                try:
                    payment.walked(listener.bounds.check(method.path, data, payment.charge))
                    request = parsed(method.read, data)
                except InvalidInput:
                    self._admission.refused("message")
                    if listener.tokens:
                        rates.fine(who, "tokens", len(data) // BYTES_A_TOKEN)
                    raise
                if sealed is not None:
                    sealed.check(request)
                return request

            if listener.tokens:
                rates.spend(who, "tokens", 0)  # a caller in debt sends nothing more
            messages = Messages(requests, read, arrive)
            held.callback(messages.close)
            request: Any = messages
            if not method.is_streamed_to:
                with self._deadlines.after(_MESSAGE_SECONDS, context.cancel):
                    request = messages.only()
            # A caller who does not read holds the call in gRPC's send.
            held.enter_context(self._deadlines.after(self._most_seconds(method), context.cancel))
            call = Call(context, who, payment, certificate)
            responses = method.behaviour(request, cast("grpc.ServicerContext", call))
            for response in responses if method.is_streamed_from else (responses,):
                if method.path != LEAVE:
                    self._admission.recheck(certificate)
                written = method.write(response)
                # A Generate's last response says so; marking it spares one of its own.
                is_last = not method.is_streamed_from or bool(getattr(response, "finish", 0))
                yield written if sealed is None else sealed.seal(written, last=is_last)
            if sealed is not None and not sealed.is_answered:
                yield sealed.seal(b"", last=True)


def sealed_to(details: grpc.HandlerCallDetails) -> str:
    """The id of the key that a call is sealed to; "" for one in the clear."""
    found = [value for key, value in details.invocation_metadata or () if key == KEY_METADATA]
    return str(found[0]) if found else ""


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
