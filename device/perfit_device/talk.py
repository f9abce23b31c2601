"""A talk: its turns, and what can be taken back. It asks nobody and prints nothing."""

from __future__ import annotations

from dataclasses import dataclass, field

from perfit_device.answers import Message
from perfit_shared.errors import InvalidInput

__all__ = ["Talk"]


@dataclass
class Talk:
    system: str = ""  # "" leaves it to the task
    turns: list[Message] = field(default_factory=list)  # user and assistant, by turns

    def messages(self) -> tuple[Message, ...]:
        """What the model reads next."""
        head = [Message("system", self.system)] if self.system else []
        return (*head, *self.turns)

    def ask(self, text: str) -> None:
        self.turns.append(Message("user", text))

    def answer(self, text: str) -> None:
        """An empty answer takes the question back: chat templates want turns that alternate."""
        if text.strip():
            self.turns.append(Message("assistant", text))
        elif self.turns and self.turns[-1].role == "user":
            self.turns.pop()

    def undo(self) -> str:
        """Take the last question and its answer back; the question. Raises InvalidInput on an empty talk."""
        if not self.turns:
            raise InvalidInput("there is nothing to take back")
        if self.turns[-1].role == "assistant":
            self.turns.pop()
        return self.turns.pop().content

    def last_answer(self) -> tuple[tuple[Message, ...], str]:
        """(what was read, the answer). Raises InvalidInput where there is none."""
        if not self.turns or self.turns[-1].role != "assistant":
            raise InvalidInput("there is no answer yet")
        head = self.messages()[: len(self.messages()) - 1]
        return head, self.turns[-1].content
