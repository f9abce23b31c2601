"""A command at a terminal of its own, which a test types into."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import struct
import subprocess
import termios
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

__all__ = ["Terminal"]

_SECONDS = 60.0  # for what is sure to come


class Terminal:
    """Ctrl-C typed here reaches the command as a signal: the terminal is its controlling one."""

    def __init__(self, *words: str, env: Mapping[str, str] | None = None, columns: int = 80) -> None:
        self._ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        self._process = subprocess.Popen(
            words,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env={**os.environ, "TERM": "dumb", **(env or {})},
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # noqa: PLW1509
        )
        os.close(theirs)
        self.seen = ""

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._ours)

    def type(self, text: str) -> None:
        os.write(self._ours, text.encode())

    def interrupt(self) -> None:
        """Ctrl-C, once the command sleeps until a key comes.

        Python's readline keeps a signal that comes between its prompt and that sleep until the next key.
        """
        status = Path(f"/proc/{self._process.pid}/stat")
        until = time.monotonic() + _SECONDS
        while status.read_text().rpartition(")")[2].split()[0] != "S":
            assert time.monotonic() < until, "the command never waits"
            time.sleep(0.001)
        self.type("\x03")

    def wait_for(self, text: str) -> str:
        """What came before it, since the last call."""
        until = time.monotonic() + _SECONDS
        while text not in self.seen:
            ready, _, _ = select.select([self._ours], [], [], max(0.0, until - time.monotonic()))
            assert ready, f"no {text!r} in {self.seen!r}"
            try:
                self.seen += os.read(self._ours, 4096).decode(errors="replace")
            except OSError as error:  # the command has closed it
                raise AssertionError(f"ended without {text!r}: {self.seen!r}") from error
        before, _, self.seen = self.seen.partition(text)
        return before

    def ends_with(self) -> int:
        """Its exit code; what it still prints is read."""
        while True:
            try:
                if not os.read(self._ours, 4096):
                    break
            except OSError:
                break
        return self._process.wait(_SECONDS)
