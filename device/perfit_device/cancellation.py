"""Ending an operation from another thread while it waits, as Ctrl-C does in the thread that started.

    cancellation = Cancellation()
    with cancellation.scope():
        performer.perform(…)          # raises KeyboardInterrupt soon after cancellation.cancel()

What waits (`cloud`, `RetryPolicy`) says how its wait is cut short: `waiting`, `pause`. Outside of a scope
they add nothing.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from functools import partial
from queue import SimpleQueue
from typing import Any, TypeVar

__all__ = ["Cancellation", "away", "pause", "uninterrupted", "wait_until_cancelled", "waiting"]

_ENDING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
_T = TypeVar("_T")
_NAP_SECONDS = 3600.0  # a wait without an end could not be interrupted on Windows


class Cancellation:
    """Whether the work of a scope is to end. Any thread may `cancel` it, at any time."""

    def __init__(self) -> None:
        self._cancelled = threading.Event()
        self._lock = threading.Lock()
        self._ends: list[Callable[[], object]] = []
        self._was_raised = False

    @contextlib.contextmanager
    def scope(self) -> Iterator[None]:
        """What this thread does inside is what `cancel` ends."""
        token = _current.set(self)
        try:
            yield
        finally:
            _current.reset(token)

    @staticmethod
    def current() -> Cancellation | None:
        """That of the scope that this thread is in."""
        return _current.get()

    def cancel(self) -> None:
        with self._lock:
            self._cancelled.set()
            ends = list(self._ends)
        for end in ends:
            end()

    def check(self, *, again: bool = True) -> None:
        """Raises KeyboardInterrupt once cancelled; unless `again`, only where nothing raised it before."""
        if self._cancelled.is_set() and (again or not self._was_raised):
            self._was_raised = True
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def calling(self, end: Callable[[], object]) -> Iterator[None]:
        """`cancel` calls `end` while the block waits; the block then ends in KeyboardInterrupt."""
        with self._lock:
            self.check()
            self._ends.append(end)
        try:
            yield
        finally:
            with self._lock:
                self._ends.remove(end)
            self.check()

    def wait(self, seconds: float) -> None:
        self._cancelled.wait(seconds)
        self.check()


_current: ContextVar[Cancellation | None] = ContextVar("cancellation", default=None)


@contextlib.contextmanager
def waiting(end: Callable[[], object]) -> Iterator[None]:
    """A wait that `end`, called from another thread, cuts short."""
    cancellation = _current.get()
    if cancellation is None:
        yield
        return
    with cancellation.calling(end):
        yield


def pause(seconds: float) -> None:
    """Sleep. Raises KeyboardInterrupt when the scope is cancelled meanwhile."""
    cancellation = _current.get()
    if cancellation is None:
        time.sleep(seconds)
    else:
        cancellation.wait(seconds)


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C, SIGTERM and SIGHUP wait for the end of the block, which should take no time.

    gRPC starts a call and then the thread that reads its end; interrupted between them, the channel's
    `close` waits for ever. Threads but the main one are never interrupted.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[tuple[int, Any]] = []
    found: dict[int, Any] = {number: signal.getsignal(number) for number in _ENDING}
    handlers = {number: handler for number, handler in found.items() if callable(handler)}
    is_inside = True

    def later(number: int, frame: Any) -> None:
        if is_inside:
            came.append((number, frame))
        else:  # a handler that came back before this one has raised, and left this one in its place
            handlers[number](number, frame)

    for number in handlers:
        signal.signal(number, later)
    try:
        yield
    finally:
        is_inside = False
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for number, frame in came[:1]:
            handlers[number](number, frame)


def away(wait: Callable[[], _T]) -> _T:
    """What `wait` returns or raises; the main thread has another one wait, and can be interrupted meanwhile.

    gRPC waits under locks. Interrupted on the way out of one it leaves it locked, and no call ever ends.
    """
    if threading.current_thread() is not threading.main_thread():
        return wait()
    ends: SimpleQueue[Callable[[], _T]] = SimpleQueue()

    def work() -> None:
        try:
            value = wait()
            ends.put(lambda: value)
        except BaseException as error:
            ends.put(partial(_raise, error))

    threading.Thread(target=work, daemon=True).start()
    return ends.get()()


def _raise(error: BaseException) -> Any:
    raise error


def wait_until_cancelled() -> None:
    """Raises KeyboardInterrupt once the caller of this operation has left: for what runs until then."""
    while True:
        pause(_NAP_SECONDS)
