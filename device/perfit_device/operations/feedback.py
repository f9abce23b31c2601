"""Learning from use: what a person keeps or corrects becomes an example at once."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Literal

from perfit_device.answers import Answer
from perfit_device.operations.operation import Emit, Operation
from perfit_shared.errors import InvalidData, InvalidInput, NotFound

if TYPE_CHECKING:
    from perfit_device.profile import Profile

__all__ = ["Correct", "Feedback", "Keep", "Learned", "LearnedStatus"]

LearnedStatus = Literal["added", "known", "nothing"]


@dataclass(frozen=True)
class Learned:
    """`example` is the name of what was added, or was there already; "" where nothing was learned."""

    status: LearnedStatus
    task: str = ""
    example: str = ""


@dataclass(frozen=True)
class Keep(Operation[Learned]):
    """This answer is as its owner would have written it. Raises InvalidInput where it is empty."""

    answer: Answer

    def run(self, profile: Profile, emit: Emit) -> Learned:
        return _learn(profile, self.answer, self.answer.text)


@dataclass(frozen=True)
class Correct(Operation[Learned]):
    """A kept answer, in its owner's words; an unchanged text teaches nothing. Raises NotFound."""

    text: str
    answer: str = ""  # its name; "" is the newest

    def run(self, profile: Profile, emit: Emit) -> Learned:
        answer = _find(profile, self.answer)
        if self.text.strip() == answer.text.strip():
            return Learned("nothing", answer.task)
        return _learn(profile, answer, self.text)


@dataclass(frozen=True)
class Feedback(Operation[Learned]):
    """A thumb: up keeps the answer, down alone is only noted beside it. A correction counts either way.

    Raises NotFound where the answer is not kept.
    """

    answer: str  # its whole name
    rating: Literal["up", "down"]
    correction: str | None = None

    def run(self, profile: Profile, emit: Emit) -> Learned:
        from perfit_device import answers

        with profile.vault() as vault:
            answer = answers.get(vault, self.answer)
        if answer is None:
            raise NotFound(
                "this answer is not kept; those to apps are while the log is on (`perfit log on`), and "
                "responses with store: true"
            )
        _note(profile, answer, self.rating)
        if self.correction is not None and self.correction.strip() != answer.text.strip():
            return _learn(profile, answer, self.correction)
        if self.rating == "up":
            return _learn(profile, answer, answer.text)
        return Learned("nothing", answer.task)


def _find(profile: Profile, name: str) -> Answer:
    from perfit_device.operations import log

    with profile.vault() as vault:
        return log.find(vault, name)


def _note(profile: Profile, answer: Answer, rating: str) -> None:
    from perfit_device import answers

    extra = json.loads(answer.extra or "{}")
    if isinstance(extra, dict):  # whoever kept it may have written something else
        with profile.vault() as vault:
            answers.put(vault, replace(answer, extra=json.dumps(extra | {"rating": rating})))


def _learn(profile: Profile, answer: Answer, text: str) -> Learned:
    """Of a talk the newest message is the prompt: the task of talks has no field for earlier turns."""
    from perfit_device import history
    from perfit_device.history import HistoryItem

    task = profile.task(answer.task or "chat")
    fields = dict(answer.fields)
    if answer.messages:
        asked = [message.content for message in answer.messages if message.role == "user"]
        fields[task.text_field] = asked[-1] if asked else ""
    date = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"
    try:
        item = HistoryItem.make(task, fields | {task.gold_field: text.strip()}, date=date)
    except InvalidData as error:
        raise InvalidInput(f"no example of {task.name} can be made of this answer: {error}") from error
    with profile.vault() as vault:
        added, _ = history.add(vault, [item])
    return Learned("added" if added else "known", task.name, item.name)
