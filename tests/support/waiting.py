"""Waiting for what another thread or process does."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import IO

SECONDS = 30.0  # long enough for a loaded machine; nothing waits longer than it must


def wait_for(condition: Callable[[], object], *, seconds: float = SECONDS, what: str = "") -> None:
    """Return once `condition` holds; fail, naming `what`, when it still does not after `seconds`."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"after {seconds:g} s still not: {what or 'what was waited for'}"
        time.sleep(0.005)


def read_until(stream: IO[str], word: str) -> str:
    """The lines up to the one with `word`; fail, showing them, when the stream ends before it."""
    said = ""
    while word not in said:
        line = stream.readline()
        assert line, said
        said += line
    return said
