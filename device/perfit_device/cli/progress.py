"""Progress of long work on stderr."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from perfit_device.cli.common import say, show

if TYPE_CHECKING:
    from perfit_device.operations.operation import Event

__all__ = ["Progress"]

_TENTHS = 10  # lines of a whole run, where there is no terminal


class Progress:
    """One line that renews itself on a terminal and fits it; elsewhere a line now and then.

    Use `with`, which ends the line.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._started: tuple[int, float] | None = None  # the first step seen, and when
        self._is_terminal = sys.stderr.isatty()
        self._is_open = False  # whether the cursor stands in the line

    def step(self, step: int, steps: int, loss: float | None) -> None:
        shown = "" if loss is None else f"  loss {loss:.4f}"
        self._show(f"step {step}/{steps}{shown}{self._pace(step, steps)}", step, steps)

    def _pace(self, done: int, total: int) -> str:
        """Rate and time left, by the steps of this run: a resumed one has others behind it."""
        now = self._clock()
        if self._started is None or done < self._started[0]:
            self._started = (done, now)
        first, since = self._started
        if done == first or now <= since:
            return ""
        rate = (done - first) / (now - since)
        return f"  {rate:.1f}/s  {_duration((total - done) / rate)} left"

    def count(self, what: str, done: int, total: int) -> None:
        self._show(f"{what}: {done}/{total}", done, total)

    def say(self, text: str) -> None:
        """A line for a person, below."""
        self._end()
        say(text)

    def step_or_note(self, event: Event) -> None:
        """Of an update."""
        from perfit_device.operations.operation import Progress as Step

        if isinstance(event, Step):
            self.step(event.done, event.total, event.loss)
        else:
            self.note(event)

    def note(self, event: Event) -> None:
        """What `show` says, below."""
        self._end()
        show(event)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def _end(self) -> None:
        if self._is_open:
            print(file=sys.stderr)
        self._is_open = False

    def _show(self, line: str, done: int, total: int) -> None:
        if self._is_terminal:
            # A line as wide as the terminal would wrap, and the next could not overwrite it.
            width = _columns() - 1
            print(f"\r{line[:width]:<{min(40, width)}}", end="", file=sys.stderr, flush=True)
            self._is_open = True
        elif done in {1, total} or done % max(1, total // _TENTHS) == 0:
            say(line)


def _duration(seconds: float) -> str:
    """Rounded up, so that nothing takes longer than it says for want of a second."""
    whole = math.ceil(seconds)
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60}:{whole % 60:02} min" if whole < 3600 else f"{whole / 3600:.1f} h"


def _columns() -> int:
    try:
        return max(2, os.get_terminal_size(sys.stderr.fileno()).columns)
    except (OSError, ValueError):
        return 80
