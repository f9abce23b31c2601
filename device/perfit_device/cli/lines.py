"""Messages that a person types: several lines, Ctrl-C, Ctrl-D; a history of lines in memory alone."""

from __future__ import annotations

import contextlib
import sys

from perfit_device.cli.common import say
from perfit_shared.errors import InvalidInput
from perfit_shared.terminal import read_stdin_line, utf8

__all__ = ["Interrupted", "read_message"]

_QUOTES = '"""'
_LARGEST = 1 << 22  # characters of a message, bytes of a piped line


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, and no other signal."""


def read_message() -> str | None:
    """The next message; None at the end of input, or when Ctrl-C came twice at an empty prompt.

    A backslash at the end of a line goes on with the next one, and quotes hold lines together. Where the
    terminal tells pasted text from typed one, its line breaks are part of the message.
    """
    was_interrupted = False
    while True:
        try:
            return _read()
        except Interrupted:
            print(flush=True)
            if was_interrupted and not _typed():
                return None
            was_interrupted = not _typed()
            if was_interrupted:
                say("Ctrl-C again ends, as Ctrl-D does")


def _read() -> str | None:
    line = _line("> ")
    if line is None:
        return None
    lines = []
    if line.lstrip().startswith(_QUOTES):
        rest: str | None = line.lstrip().removeprefix(_QUOTES)
        while rest is not None and not rest.rstrip().endswith(_QUOTES):
            lines.append(rest)
            rest = _line(". ")
        if rest is not None:
            lines.append(rest.rstrip().removesuffix(_QUOTES))
        return _whole(lines).strip("\n")
    while line is not None and line.endswith("\\"):
        lines.append(line[:-1])
        line = _line(". ")
    return _whole([*lines, line or ""])


def _whole(lines: list[str]) -> str:
    text = "\n".join(lines)
    if len(text) > _LARGEST:
        raise InvalidInput("this message is longer than 4 million characters; send less at a time")
    return utf8(text, "the message")


def _line(prompt: str) -> str | None:
    """Without its end; None at the end of input. Prompts are for terminals."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return read_stdin_line(_LARGEST)
    with contextlib.suppress(ImportError):
        import readline  # gives input() line editing; its history is written nowhere

        readline.parse_and_bind("set enable-bracketed-paste on")
    try:
        return input(prompt)
    except EOFError:
        print(flush=True)
        return None


def _typed() -> str:
    """What stands at the prompt that Ctrl-C left."""
    with contextlib.suppress(ImportError):
        import readline

        return readline.get_line_buffer().strip()
    return ""
