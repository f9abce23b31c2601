"""A call that waits for what the scheduler computes, until its caller leaves or its time is over."""

from __future__ import annotations

import threading
import time
from concurrent.futures import CancelledError, Future
from typing import Any, TypeVar

from perfit_cloud.service.interceptor import Call
from perfit_shared.errors import Cancelled, TooSlow

__all__ = ["CallWait"]

_T = TypeVar("_T")


class CallWait:
    def __init__(self, call: Call, seconds: float, *, too_slow: str) -> None:
        """`too_slow`: the caller's error message when the call has lasted `seconds`. Raises Cancelled."""
        self.left = threading.Event()  # set when nobody waits for answers any more
        self._ends = time.monotonic() + seconds
        self._too_slow = too_slow
        self._future: Future[Any] | None = None
        # gRPC calls this when the RPC ends, however it does: the caller left, or its deadline passed.
        if not call.add_callback(self.leave):
            raise Cancelled("the caller left")

    @property
    def seconds_left(self) -> float:
        return max(0.0, self._ends - time.monotonic())

    def leave(self) -> None:
        self.left.set()
        if self._future is not None:
            self._future.cancel()

    def over(self) -> TooSlow:
        """What ends a call whose time is over."""
        return TooSlow(self._too_slow)

    def result(self, future: Future[_T]) -> _T:
        """What was computed. Raises TooSlow, Cancelled, and what ended the future.

        A caller must not hold on to the future: it and its error's frames would form a cycle.
        """
        self._future = future
        try:
            if self.left.is_set():  # before the future was there to be cancelled
                future.cancel()
            return future.result(self.seconds_left)
        except TimeoutError:
            future.cancel()
            raise self.over() from None
        except CancelledError:
            raise Cancelled("the caller left") from None
        finally:
            self._future = None
            del future
