"""Waiting for a cloud that is busy or away, instead of losing work half-way."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

from perfit_device.cancellation import pause
from perfit_shared.errors import Busy, TooSlow, Unavailable

__all__ = ["NO_RETRIES", "TRANSIENT", "RetryPolicy"]

_T = TypeVar("_T")
_LATER = 1.25  # at most, times the delay that a cloud asked for
TRANSIENT = (Unavailable, TooSlow, Busy)  # what may be over in a while


@dataclass(frozen=True)
class RetryPolicy:
    """How long a call waits for a cloud that is busy or gone, in seconds."""

    give_up: float = 60.0  # after this long without an answer
    first_wait: float = 0.5
    longest_wait: float = 8.0
    sleep: Callable[[float], object] = pause
    clock: Callable[[], float] = time.monotonic
    notify: Callable[[str], None] | None = None  # gets the reason of the first wait

    def call(self, call: Callable[[], _T]) -> _T:
        """The call's value; while the cloud is busy or away, again with growing, jittered waits."""
        since, wait, notified = self.clock(), self.first_wait, self.notify is None
        while True:
            try:
                return call()
            except TRANSIENT as error:
                # Jitter spreads devices that lost a cloud at the same time.
                asked = error.retry_ms / 1000 * random.uniform(1, _LATER)  # noqa: S311
                pause = max(random.uniform(wait / 2, wait), asked)  # noqa: S311
                if self.clock() - since + pause > self.give_up:
                    raise
                if self.notify is not None and not notified:
                    self.notify(f"{error}; waiting, for {self.give_up:.0f} s at most")
                    notified = True
                self.sleep(pause)
                wait = min(2 * wait, self.longest_wait)

    def stream(self, call: Callable[[], Iterator[_T]]) -> Generator[_T, None, None]:
        """The call's values. Retries only before the first: later it would repeat values."""

        def start() -> tuple[list[_T], Iterator[_T]]:
            values = call()
            return list(islice(values, 1)), values

        first, rest = self.call(start)
        yield from first
        yield from rest


NO_RETRIES = RetryPolicy(give_up=0.0)  # the first failure ends it
