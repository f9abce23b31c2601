"""A gRPC channel on which every call is sealed, so that a front which ends TLS reads none of them.

Generated stubs work on it as on any other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import grpc

from perfit_device.cloud.channels import mutual_channel
from perfit_device.cloud.identity import Enrolment
from perfit_device.cloud.sealing import SealedCall, Sealer, Sealing
from perfit_shared.errors import SealBroken
from perfit_shared.wire import personalization_pb2 as pb

__all__ = ["SealedChannel", "opened_channel"]


def opened_channel(
    enrolment: Enrolment,
    address: str,
    sealing: Sealing | None,
    keys: Callable[[grpc.Channel], Iterable[pb.SealingKey]],
) -> tuple[grpc.Channel, Sealer | None]:
    """A channel to a cloud's devices' listener, or to the front before it, and what seals on it.

    `keys` asks over a channel, in the clear, for the keys of the server behind it.
    """
    if sealing is None:
        return mutual_channel(enrolment, address), None
    clear = mutual_channel(enrolment, address, sealing.front_roots)
    sealer = Sealer(enrolment, sealing, lambda: keys(clear))
    return SealedChannel(clear, sealer), sealer


class SealedChannel(grpc.Channel):
    """A channel on which every call is sealed."""

    def __init__(self, channel: grpc.Channel, sealer: Sealer) -> None:
        self._channel, self._sealer = channel, sealer

    def unary_unary(
        self,
        method: str,
        request_serializer: Any = None,
        response_deserializer: Any = None,
        *_: Any,
        **__: Any,
    ) -> Any:
        return _Unary(
            self._channel.unary_stream(method),
            self._call_of(method),
            request_serializer,
            response_deserializer,
        )

    def unary_stream(
        self,
        method: str,
        request_serializer: Any = None,
        response_deserializer: Any = None,
        *_: Any,
        **__: Any,
    ) -> Any:
        begin: Any = self._channel.unary_stream(method)

        def call(request: Any, timeout: float | None = None) -> Any:
            sealed = self._call_of(method)()
            data = sealed.seal(request, request_serializer(request), last=True)
            return _Responses(
                begin(data, timeout=timeout, metadata=sealed.metadata), sealed, response_deserializer
            )

        return call

    def stream_stream(
        self,
        method: str,
        request_serializer: Any = None,
        response_deserializer: Any = None,
        *_: Any,
        **__: Any,
    ) -> Any:
        begin: Any = self._channel.stream_stream(method)

        def call(requests: Iterator[Any], timeout: float | None = None) -> Any:
            sealed = self._call_of(method)()

            def messages() -> Iterator[bytes]:
                for request in requests:
                    yield sealed.seal(request, request_serializer(request), last=False)
                yield sealed.seal(None, b"", last=True)

            return _Responses(
                begin(messages(), timeout=timeout, metadata=sealed.metadata), sealed, response_deserializer
            )

        return call

    def stream_unary(self, method: str, *_: Any, **__: Any) -> Any:
        raise NotImplementedError("no method of perfit's streams requests for one response")

    def _call_of(self, method: str) -> Callable[[], SealedCall]:
        return lambda: SealedCall(self._sealer, method)

    def subscribe(self, callback: Any, try_to_connect: bool | None = False) -> None:
        self._channel.subscribe(callback, bool(try_to_connect))

    def unsubscribe(self, callback: Any) -> None:
        self._channel.unsubscribe(callback)

    def close(self) -> None:
        self._channel.close()

    def __enter__(self) -> SealedChannel:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


class _Unary:
    """A method of one request and one response.

    gRPC's own waits until the deadline where a second response comes, so this takes them as a stream.
    """

    def __init__(self, method: Any, begin: Callable[[], SealedCall], write: Any, read: Any) -> None:
        self._method, self._begin, self._write, self._read = method, begin, write, read

    def __call__(self, request: Any, timeout: float | None = None) -> Any:
        return self.future(request, timeout).result()

    def future(self, request: Any, timeout: float | None = None) -> _Future:
        sealed = self._begin()
        data = sealed.seal(request, self._write(request), last=True)
        return _Future(self._method(data, timeout=timeout, metadata=sealed.metadata), sealed, self._read)


class _Future:
    def __init__(self, call: Any, sealed: SealedCall, read: Callable[[bytes], Any]) -> None:
        self._call, self._sealed, self._read = call, sealed, read

    def result(self) -> Any:
        """Raises grpc.RpcError, and SealBroken."""
        try:
            responses = list(islice(self._call, 2))
        except grpc.RpcError as error:
            self._sealed.failed(error)
            raise
        if len(responses) != 1:
            self._call.cancel()
            raise SealBroken("the cloud's answer is missing or came twice; something on the way did that")
        return self._read(self._sealed.open(responses[0], is_only=True) or b"")

    def cancel(self) -> Any:
        return self._call.cancel()


class _Responses(Iterator[Any]):
    """Responses as they come, until the one that is marked as the last."""

    def __init__(self, call: Any, sealed: SealedCall, read: Callable[[bytes], Any]) -> None:
        self._call, self._sealed, self._read = call, sealed, read

    def __next__(self) -> Any:
        """Raises grpc.RpcError, and SealBroken."""
        try:
            while (payload := self._sealed.open(next(self._call), is_only=False)) is None:
                continue
        except StopIteration:
            self._sealed.check_complete()
            raise
        except grpc.RpcError as error:
            self._sealed.failed(error)
            raise
        except SealBroken:
            self._call.cancel()
            raise
        return self._read(payload)

    def add_callback(self, ended: Callable[[], None]) -> Any:
        """Whether `ended` will be called when the call is over; False: it is."""
        return self._call.add_callback(ended)

    def cancel(self) -> Any:
        return self._call.cancel()
