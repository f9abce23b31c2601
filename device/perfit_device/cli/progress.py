"""Progress of long work on stderr."""

from __future__ import annotations

import os
import sys

from perfit_device.cli.common import say

__all__ = ["Progress"]

_TENTHS = 10  # lines of a whole run, where there is no terminal


class Progress:
    """One line that renews itself on a terminal and fits it; elsewhere a line now and then.

    Use `with`, which ends the line.
    """

    def __init__(self) -> None:
        self._is_terminal = sys.stderr.isatty()
        self._is_open = False  # whether the cursor stands in the line

    def step(self, step: int, steps: int, loss: float) -> None:
        self._show(f"step {step}/{steps}  loss {loss:.4f}", step, steps)

    def count(self, what: str, done: int, total: int) -> None:
        self._show(f"{what}: {done}/{total}", done, total)

    def say(self, text: str) -> None:
        """A line for a person, below."""
        self._end()
        say(text)

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


def _columns() -> int:
    try:
        return max(2, os.get_terminal_size(sys.stderr.fileno()).columns)
    except (OSError, ValueError):
        return 80
