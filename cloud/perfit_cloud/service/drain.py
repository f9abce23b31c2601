"""How a cloud stops: calls under way end, new ones are refused, streams end between messages."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from perfit_shared.errors import Unavailable

__all__ = ["Drain", "stopping"]

_LOOK_SECONDS = 0.1  # between two looks whether somebody is in a hurry
_RETRY_MS = 2000  # a restart takes longer; another cloud behind the address is there at once


def stopping() -> Unavailable:
    """The error that callers get, with a retry delay."""
    return Unavailable("the cloud is stopping; try again in a moment", retry_ms=_RETRY_MS)


class Drain:
    """The calls under way, and whether more are taken on. Thread-safe."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._calls = 0
        self._listeners: set[Callable[[], None]] = set()
        self._is_on = False

    def check(self) -> None:
        """Raises what `stopping` makes, once the cloud is stopping."""
        if self._is_on:
            raise stopping()

    @contextmanager
    def call(self) -> Iterator[None]:
        """A call under way. Raises Unavailable."""
        with self._changed:
            self.check()
            self._calls += 1
        try:
            yield
        finally:
            with self._changed:
                self._calls -= 1
                self._changed.notify_all()

    @contextmanager
    def listening(self, on_begin: Callable[[], None]) -> Iterator[None]:
        """Call `on_begin` when the drain begins, or now if it has. From any thread; it must not wait."""
        with self._changed:
            self._listeners.add(on_begin)
            is_late = self._is_on
        if is_late:
            on_begin()
        try:
            yield
        finally:
            with self._changed:
                self._listeners.discard(on_begin)

    def begin(self) -> None:
        """Take no more calls. Harmless twice."""
        with self._changed:
            self._is_on = True
            listeners = list(self._listeners)
        for listener in listeners:
            listener()

    def wait(self, seconds: float, is_hurried: Callable[[], bool]) -> bool:
        """Whether all calls ended within `seconds`, and before anybody was in a hurry."""
        end = time.monotonic() + seconds
        with self._changed:
            while self._calls:
                left = end - time.monotonic()
                if left <= 0 or is_hurried():
                    return False
                self._changed.wait(min(left, _LOOK_SECONDS))
        return True
