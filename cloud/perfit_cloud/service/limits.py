"""What one request may ask for, and how many may be at it."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from perfit_shared.errors import Busy, TooSlow

__all__ = ["Gate", "Limits", "Quota"]


@dataclass(frozen=True)
class Limits:
    """Bounds on one request."""

    prompt_tokens: int  # longest prompt
    new_tokens: int  # longest answer or target, tokens, the end-of-sequence token included
    context: int  # most tokens of prompt and answer together
    examples: int  # examples of one gradient, candidates of one Score
    call_tokens: int  # prompt and target tokens of one gradient or Score together
    message_bytes: int  # largest request
    adapt_examples: int  # examples of one Adapt stream
    adapt_tokens: int  # prompt and target tokens of one Adapt stream together
    questions: int  # of one Ask stream, waiting for their answers


class Gate:
    """Lets `running` callers work at once and `waiting` more stand in line; the rest come back later."""

    def __init__(self, *, running: int, waiting: int, retry_ms: int) -> None:
        self._places = threading.Semaphore(running)
        self._room = threading.Semaphore(running + waiting)
        self._retry_ms = retry_ms

    @contextmanager
    def place(self, seconds: float) -> Iterator[None]:
        """Hold a place to work. Raises Busy when the line is full, TooSlow after `seconds` in it."""
        if not self._room.acquire(blocking=False):
            raise Busy("the cloud is busy; try again shortly", retry_ms=self._retry_ms)
        try:
            if not self._places.acquire(timeout=max(0.0, seconds)):
                raise TooSlow("the cloud did not get to this call before its deadline; try again")
            try:
                yield
            finally:
                self._places.release()
        finally:
            self._room.release()


class Quota:
    """Lets one device hold `each` places at once, over all its connections together."""

    def __init__(self, *, each: int, retry_ms: int) -> None:
        self._each = each
        self._retry_ms = retry_ms
        self._lock = threading.Lock()
        self._held: Counter[str] = Counter()  # of devices that hold some

    @contextmanager
    def place(self, device: str) -> Iterator[None]:
        """Hold one of the device's places. Raises Busy when it has them all."""
        with self._lock:
            if self._held[device] >= self._each:
                message = "this device has as much under way as one may; try again shortly"
                raise Busy(message, retry_ms=self._retry_ms)
            self._held[device] += 1
        try:
            yield
        finally:
            with self._lock:
                self._held[device] -= 1
                if not self._held[device]:
                    del self._held[device]
