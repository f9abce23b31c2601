"""Answers that are kept, sealed: the newest one, and all of them for those who turn the log on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from perfit_device import answers
from perfit_device.answers import Answer
from perfit_device.operations.operation import Emit, Operation
from perfit_shared.errors import InvalidInput, NotFound

if TYPE_CHECKING:
    from perfit_device.profile import Profile
    from perfit_device.vault.store import Vault

__all__ = ["ClearLog", "FindAnswer", "Log", "LogAnswer", "ReadLog", "Record", "SetLog", "find"]

_LONGEST = 1000  # answers in the log; the oldest make room
_LAST = "last"  # name of the newest answer where the log is off
_SETTING = ("setting", "log")


@dataclass(frozen=True)
class Log:
    is_on: bool
    answers: tuple[Answer, ...]  # oldest first


@dataclass(frozen=True)
class SetLog(Operation[bool]):
    """Whether answers are logged from here on. Those of before stay until ClearLog."""

    on: bool

    def run(self, profile: Profile, emit: Emit) -> bool:
        with profile.vault() as vault:
            vault.put(*_SETTING, b"on" if self.on else b"off")
        return self.on


@dataclass(frozen=True)
class Record(Operation[Answer]):
    """Keep an answer, as it is kept then: in the log, or in the place of the one before."""

    answer: Answer
    log: bool = False  # even where the log is off

    def run(self, profile: Profile, emit: Emit) -> Answer:
        with profile.vault() as vault, vault.transaction():
            if self.log or _is_on(vault):
                answers.delete(vault, _LAST)
                _add(vault, self.answer)
                return self.answer
            kept = replace(self.answer, name=_LAST)
            answers.put(vault, kept)
            return kept


@dataclass(frozen=True)
class LogAnswer(Operation[bool]):
    """An answer to an app: kept where the log is on, and not at all elsewhere. Whether it is kept."""

    answer: Answer

    def run(self, profile: Profile, emit: Emit) -> bool:
        with profile.vault() as vault, vault.transaction():
            is_on = _is_on(vault)
            if is_on:
                _add(vault, self.answer)
        return is_on


@dataclass(frozen=True)
class ReadLog(Operation[Log]):
    def run(self, profile: Profile, emit: Emit) -> Log:
        with profile.vault() as vault:
            return Log(_is_on(vault), tuple(_logged(vault)))


@dataclass(frozen=True)
class FindAnswer(Operation[Answer]):
    """Raises NotFound."""

    name: str = ""  # or its first characters; "" is the newest

    def run(self, profile: Profile, emit: Emit) -> Answer:
        with profile.vault() as vault:
            return find(vault, self.name)


@dataclass(frozen=True)
class ClearLog(Operation[int]):
    """Forget all of them for good; how many. What apps stored stays."""

    def run(self, profile: Profile, emit: Emit) -> int:
        with profile.vault() as vault, vault.transaction():
            logged = _logged(vault)
            for answer in logged:
                answers.delete(vault, answer.name)
        return len(logged)


def find(vault: Vault, name: str) -> Answer:
    """Raises NotFound, or InvalidInput where several are meant."""
    if not name:
        if logged := _logged(vault):
            return logged[-1]
        raise NotFound("no answer is kept yet; `perfit ask` and `perfit chat` keep the newest one")
    if exact := answers.get(vault, name):
        return exact
    found = [a for a in _logged(vault) if len(name) >= 4 and a.name.startswith(name.lower())]
    if not found:
        raise NotFound(f'no answer "{name[:64]}" is kept; `perfit log list` shows those that are')
    if len(found) > 1:
        raise InvalidInput(f'"{name[:64]}" means {len(found)} answers; type more of the name')
    return found[0]


def _add(vault: Vault, answer: Answer) -> None:
    """The oldest make room."""
    logged = [other for other in _logged(vault) if other.name != answer.name]
    for old in logged[: max(0, len(logged) + 1 - _LONGEST)]:
        answers.delete(vault, old.name)
    answers.put(vault, answer)


def _is_on(vault: Vault) -> bool:
    return vault.get(*_SETTING) == b"on"


def _logged(vault: Vault) -> list[Answer]:
    """Without the responses that apps stored."""
    return [answer for answer in answers.load(vault) if not answer.is_response]
