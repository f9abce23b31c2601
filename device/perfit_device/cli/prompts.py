"""Questions at the terminal, which also work where stdin is data."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path

from perfit_shared.errors import ConfigError

__all__ = ["ask_passphrase", "has_terminal", "require_yes", "without_questions"]

_MAY_ASK: ContextVar[bool] = ContextVar("may_ask", default=True)
_DEVICE = "CONIN$" if os.name == "nt" else "/dev/tty"


def has_terminal() -> bool:
    """Whether this process has a terminal to ask at, whatever its streams are."""
    if not _MAY_ASK.get():
        return False
    with contextlib.suppress(OSError):
        os.close(os.open(_DEVICE, os.O_RDWR))
        return True
    return False


@contextlib.contextmanager
def without_questions() -> Iterator[None]:
    """As if there were no terminal: for what runs inside another program."""
    token = _MAY_ASK.set(False)
    try:
        yield
    finally:
        _MAY_ASK.reset(token)


def ask_passphrase(prompt: str, *, confirm: bool = False) -> str:
    """Typed on the terminal, unseen. Raises ConfigError where there is none."""
    if not has_terminal():
        raise ConfigError("a passphrase is needed; set PERFIT_PASSPHRASE, or run this in a terminal")
    first = _typed(f"{prompt}: ")
    if not first:
        raise ConfigError("an empty passphrase protects nothing; type one")
    if confirm and _typed("The same again: ") != first:
        raise ConfigError("the two passphrases differ; try again")
    return first


def _typed(prompt: str) -> str:
    import getpass

    try:
        return getpass.getpass(prompt)
    except EOFError as error:
        raise ConfigError("no passphrase was typed; try again") from error
    except UnicodeError as error:
        raise ConfigError("what was typed is not text in the terminal's encoding; try again") from error


def require_yes(question: str) -> None:
    """Raises ConfigError unless somebody at the terminal types "yes"."""
    if not has_terminal():
        raise ConfigError(f"{question} Say so with --yes, or run this in a terminal")
    with Path(_DEVICE).open("r+b", buffering=0) as terminal:
        terminal.write(f"{question} Type yes: ".encode())
        answer = terminal.readline(64).decode(errors="replace")
    if answer.strip().lower() not in ("y", "yes"):
        raise ConfigError("nothing was changed")
