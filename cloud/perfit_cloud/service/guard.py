"""What stands in front of every RPC: who calls, how many, and how an error is told.

gRPC looks at a certificate once, at the handshake, and knows no revocation list; here both its time and
its identity are checked on every call and before every message of a stream.
"""

from __future__ import annotations

import logging
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
from cryptography import x509

from perfit_cloud.service.authority import Authority
from perfit_cloud.service.certificates import identity_of, read_certificate
from perfit_cloud.service.limits import Gate
from perfit_shared.errors import NotAuthenticated, to_status

__all__ = ["Guard", "caller", "device_of", "seconds_left", "told"]

_log = logging.getLogger(__name__)
# Long-lived and served without a thread; it tells only whether the cloud serves.
_HEALTH_WATCH = "/grpc.health.v1.Health/Watch"
_LATE_SECONDS = 5.0  # after its time a stream is cut off; until then it ends by itself, and says why


def caller(context: grpc.ServicerContext) -> x509.Certificate:
    """The certificate that the caller's channel was opened with. Raises NotAuthenticated without one."""
    pem = context.auth_context().get("x509_pem_cert")
    if not pem:
        raise NotAuthenticated("this call needs a device certificate; enrol with `perfit enroll`")
    return read_certificate(bytes(list(pem)[0]), pem=True)  # noqa: RUF015


def device_of(context: grpc.ServicerContext) -> str:
    """The identity that calls. Raises NotAuthenticated."""
    return identity_of(caller(context))


def seconds_left(context: grpc.ServicerContext, cap: float) -> float:
    """Until the call's deadline, at most `cap`."""
    remaining = context.time_remaining()
    return cap if remaining is None else min(cap, max(0.0, remaining))


class Guard(grpc.ServerInterceptor):
    """Wraps every method of a server. Without an authority (enrolment) anybody may call."""

    def __init__(
        self, *, authority: Authority | None, gate: Gate, call_seconds: float, stream_seconds: float
    ) -> None:
        """The most time of calls that answer in a stream, and of those that stream both ways."""
        self._authority = authority
        self._gate = gate
        self._call_seconds = call_seconds
        self._stream_seconds = stream_seconds

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], grpc.RpcMethodHandler[Any, Any] | None],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        handler = continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or method == _HEALTH_WATCH:
            return handler
        if handler.unary_unary is not None:
            return grpc.unary_unary_rpc_method_handler(
                self._unary(handler.unary_unary, method),
                handler.request_deserializer,
                handler.response_serializer,
            )
        if handler.unary_stream is not None:
            return grpc.unary_stream_rpc_method_handler(
                self._stream(handler.unary_stream, method, self._call_seconds),
                handler.request_deserializer,
                handler.response_serializer,
            )
        if handler.stream_stream is not None:
            return grpc.stream_stream_rpc_method_handler(
                self._stream(handler.stream_stream, method, self._stream_seconds),
                handler.request_deserializer,
                handler.response_serializer,
            )
        return None  # no method is of the fourth kind; better unknown than unguarded

    def _unary(
        self, behaviour: Callable[[Any, grpc.ServicerContext], Any], method: str
    ) -> Callable[[Any, grpc.ServicerContext], Any]:
        def guarded(request: Any, context: grpc.ServicerContext) -> Any:
            with translated(context, method):
                self._authorise(context)
                with self._gate.place(0):
                    return behaviour(request, context)

        return guarded

    def _stream(
        self, behaviour: Callable[[Any, grpc.ServicerContext], Iterator[Any]], method: str, seconds: float
    ) -> Callable[[Any, grpc.ServicerContext], Iterator[Any]]:
        def guarded(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
            with translated(context, method):
                self._authorise(context)
                with self._gate.place(0), _cut_off_after(seconds + _LATE_SECONDS, context):
                    for response in behaviour(request, context):
                        self._authorise(context)
                        yield response

        return guarded

    def _authorise(self, context: grpc.ServicerContext) -> None:
        if self._authority is not None:
            self._authority.check(caller(context))


@contextmanager
def _cut_off_after(seconds: float, context: grpc.ServicerContext) -> Iterator[None]:
    """A timer, because a caller who does not read holds the call in gRPC's send."""
    timer = threading.Timer(seconds, context.cancel)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextmanager
def translated(context: grpc.ServicerContext, method: str) -> Iterator[None]:
    """Tell any error in the one way there is: status, public message, code word, retry delay."""
    try:
        yield
    except Exception as error:
        status, code, message, retry_ms = told(error, method)
        metadata = [("perfit-code", code)]
        if retry_ms:
            metadata.append(("perfit-retry-ms", str(retry_ms)))
        context.set_trailing_metadata(tuple(metadata))
        context.abort(grpc.StatusCode[status], message)


def told(error: Exception, method: str) -> tuple[str, str, str, int]:
    """What a caller is told of an error (`to_status`); the log gets what no caller should see."""
    status = to_status(error)
    if status[0] == "INTERNAL":
        _log.error("%s failed: %s", method, _where(error))
    return status


def _where(error: BaseException) -> str:
    """Type and place of an error. Not its message: that may quote a prompt or a tensor."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "?"
    return f"{type(error).__name__} at {place}"
