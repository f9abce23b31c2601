"""The messages of one call, as they come."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import grpc

from perfit_shared.errors import Cancelled, InvalidInput

__all__ = ["Messages", "next_message", "parsed"]


class Messages(Iterator[Any]):
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
        while (message := self._next()) is None:  # the end of a sealed stream, which holds nothing
            continue
        return message

    def _next(self) -> Any:
        with self._lock:
            self._held.close()
        data = next_message(self._requests)
        if data is None:
            raise StopIteration
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


def next_message(requests: Iterator[bytes]) -> bytes | None:
    """None when there is no more. Raises Cancelled."""
    try:
        return next(requests, None)
    except grpc.RpcError as error:  # gRPC's word for it, with no code
        error.with_traceback(None)  # gRPC keeps the error, which keeps every frame that it passed
        raise Cancelled("the caller left") from None


def parsed(read: Callable[[bytes], Any], data: bytes) -> Any:
    """Raises InvalidInput on bytes that are no message."""
    try:
        return read(data)
    except Exception:
        raise InvalidInput("the cloud cannot read this message; update perfit") from None
