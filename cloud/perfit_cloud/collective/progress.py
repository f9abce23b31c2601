"""Progress of long work on stderr: one rewritten line on a terminal, else a line every five seconds."""

from __future__ import annotations

import sys
import time
from typing import TextIO

__all__ = ["Progress"]

_EVERY = {True: 0.2, False: 5.0}  # seconds between lines, by whether stderr is a terminal

_SETTLED = 15.0  # seconds until the pace is steady


class Progress:
    """Counts work in *units* (the cost of one example forward and backward).

    The remaining time assumes this process's mean pace so far, trials and validation included. It is not
    shown in the first 15 seconds, which hold one-time costs.
    `shown=False` counts and writes nothing.
    """

    def __init__(self, total: float, *, stream: TextIO | None = None, shown: bool = True) -> None:
        self.total = total
        self._quiet = not shown
        self._stream = stream or sys.stderr
        self._terminal = self._stream.isatty()
        self._started = self._shown = time.monotonic()
        self._done = 0.0  # units in this process
        self._before = 0.0  # units of an earlier process
        self._width = 0

    def skip(self, units: float) -> None:
        """Units that an earlier process did."""
        self._before += units

    def advance(self, units: float, text: str) -> None:
        """`units` more are done; show `text` with the pace and the time left, if it is time."""
        self._done += units
        now = time.monotonic()
        if self._quiet or now - self._shown < _EVERY[self._terminal]:
            return
        self._shown = now
        elapsed = now - self._started
        pace = self._done / elapsed
        line = f"{text}  {pace:.0f} examples/s"
        left = max(0.0, self.total - self._before - self._done) / pace if pace else 0.0
        if elapsed > _SETTLED:
            line += f"  {_clock(left)} left"
        self._write(line)

    def say(self, text: str) -> None:
        """A line that stays."""
        if self._quiet:
            return
        self._clear()
        self._stream.write(text + "\n")
        self._stream.flush()

    def _write(self, line: str) -> None:
        if self._terminal:
            self._stream.write("\r" + line.ljust(self._width))
            self._width = len(line)
        else:
            self._stream.write(line + "\n")
        self._stream.flush()

    def _clear(self) -> None:
        if self._terminal and self._width:
            self._stream.write("\r" + " " * self._width + "\r")
            self._width = 0


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"
