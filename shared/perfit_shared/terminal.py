"""Standard streams that fail politely, and text of strangers that cannot steer a terminal."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import unicodedata
from typing import Any, TextIO

from perfit_shared.errors import InvalidInput

__all__ = [
    "clean",
    "discard_unwritable",
    "one_line",
    "paint",
    "prepare_streams",
    "read_stdin",
    "read_stdin_bytes",
    "read_stdin_line",
    "utf8",
]

_COLOURS = {"red": 31, "green": 32, "yellow": 33}
_HARMLESS = "\n\t\u200c\u200d"  # the joiners that scripts and emoji need


def clean(text: str) -> str:
    """Text of a cloud without what could steer a terminal: controls, escapes, bidi overrides."""
    return "".join(
        c for c in text if c in _HARMLESS or unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Co")
    )


def one_line(text: str) -> str:
    return " ".join(clean(text).split())


def paint(text: str, colour: str, stream: TextIO) -> str:
    """`text` in a colour of the terminal's own, where `stream` is one and nobody asked for none.

    NO_COLOR and FORCE_COLOR decide first (any text), then CLICOLOR_FORCE=1 and CLICOLOR=0.
    """
    is_on = _colour_wanted()
    if is_on is None:
        is_on = stream.isatty() and os.environ.get("TERM") != "dumb"
    return f"\x1b[{_COLOURS[colour]}m{text}\x1b[0m" if is_on else text


def _colour_wanted() -> bool | None:
    """What the environment says; None: nothing."""
    if os.environ.get("NO_COLOR"):
        return False
    if os.environ.get("FORCE_COLOR") or os.environ.get("CLICOLOR_FORCE", "0") not in ("", "0"):
        return True
    return False if os.environ.get("CLICOLOR") == "0" else None


# -- input ---------------------------------------------------------------------------------------


def utf8(text: str, what: str) -> str:
    """An argument or variable as text. Raises InvalidInput naming `what` when its bytes are none.

    Python hands over bytes that the locale cannot decode as lone surrogates.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        try:
            return os.fsencode(text).decode()
        except UnicodeError as error:
            raise InvalidInput(f"{what} is not text in UTF-8") from error
    return text


def read_stdin_bytes(most: int) -> bytes:
    """All of stdin. A closed one is empty. Raises InvalidInput when it is longer than `most` bytes."""
    buffer = getattr(sys.stdin, "buffer", None)
    data = bytes(buffer.read(most + 1)) if buffer is not None else sys.stdin.read(most + 1).encode()
    if len(data) > most:
        raise InvalidInput(f"stdin holds more than {most >> 10} KiB; give less at a time")
    return data


def read_stdin(most: int) -> str:
    """All of stdin as text: UTF-8, else what the locale says. Raises InvalidInput as above, or on no text."""
    return _decoded(read_stdin_bytes(most))


def read_stdin_line(most: int) -> str | None:
    """The next line, without its end; None at the end of stdin. Raises InvalidInput as above."""
    buffer = getattr(sys.stdin, "buffer", None)
    data = bytes(buffer.readline(most + 1)) if buffer is not None else sys.stdin.readline(most + 1).encode()
    if len(data) > most:
        raise InvalidInput(f"a line of stdin holds more than {most >> 10} KiB; give less at a time")
    return _decoded(data).rstrip("\r\n") if data else None


def _decoded(data: bytes) -> str:
    for encoding in ("utf-8-sig", sys.stdin.encoding):
        with contextlib.suppress(UnicodeError, LookupError, TypeError):
            text = str(data, encoding)
            text.encode()  # the locale may decode what is no text to lone surrogates
            return text
    raise InvalidInput("stdin is not text in UTF-8; convert it, with iconv for example")


# -- output --------------------------------------------------------------------------------------


class _LossyWriter(io.FileIO):
    """Stderr that is full or closed: what is said there is lost, and the work goes on."""

    def write(self, data: Any, /) -> int:
        with contextlib.suppress(OSError):
            return super().write(data)
        return memoryview(data).nbytes


def prepare_streams() -> None:
    """Open what is closed, and escape characters that an encoding lacks instead of failing.

    A closed descriptor would be given to the next file that is opened, and prints would end up there.
    Stdout opens so that it cannot be written, for losing output is an error.
    """
    for number, flags in enumerate((os.O_RDONLY, os.O_RDONLY, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, flags)  # takes the lowest free number
    if sys.stdin is None:
        sys.stdin = io.TextIOWrapper(io.BufferedReader(io.FileIO(0, closefd=False)))
    if sys.stdout is None:
        sys.stdout = io.TextIOWrapper(io.BufferedWriter(io.FileIO(1, "w", closefd=False)))
    if sys.stderr is None or sys.stderr is sys.__stderr__:
        encoding = getattr(sys.stderr, "encoding", None)
        # Forgiving from the bottom: libraries write to the buffer as well.
        buffer = io.BufferedWriter(_LossyWriter(2, "w", closefd=False))
        sys.stderr = io.TextIOWrapper(buffer, encoding, errors="backslashreplace", line_buffering=True)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def discard_unwritable() -> None:
    """Let go of what stdout cannot take, or Python would try again, and complain, at exit."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, sys.stdout.fileno())
            os.close(null)
