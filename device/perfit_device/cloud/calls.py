"""RPCs under way, waited for so that Ctrl-C, or whoever cancels from another thread, ends them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc

from perfit_device.cancellation import away, uninterrupted, waiting
from perfit_shared.errors import PerfitError

__all__ = ["Stream", "awaited"]


def awaited(method: Any, request: Any, seconds: float) -> Any:
    """The response of one call, within `seconds`. Raises grpc.RpcError."""
    with uninterrupted():
        call = method.future(request, timeout=seconds)
    with waiting(call.cancel):
        try:
            return away(call.result)
        finally:
            with uninterrupted():
                call.cancel()  # an interrupted one is under way still; no harm to one that is done


class Stream:
    """The responses of a call that streams them, as they come."""

    def __init__(
        self,
        call: Any,
        count: Callable[[int], None],
        translated: Callable[[grpc.RpcError], PerfitError],
        ended: Callable[[], None] = lambda: None,
    ) -> None:
        """`ended` is called once, when the call is over."""
        self._call = call
        self._count = count
        self._translated = translated
        # From any thread: whoever closes, or gRPC's own.
        if not call.add_callback(ended):
            ended()

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> Any:
        try:
            with waiting(self._call.cancel):
                response = away(lambda: next(self._call))
        except grpc.RpcError as error:
            raise self._translated(error) from error
        self._count(response.ByteSize())
        return response

    def close(self) -> None:
        """Cancel the call. From any thread, also while another waits for a response."""
        with uninterrupted():  # a second Ctrl-C: gRPC cancels under a lock
            self._call.cancel()
