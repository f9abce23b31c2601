"""Items of a task as token ids. Stage 1 and every method of a LaMP run make their tokens here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from perfit_cloud.engine.gradients.batch import Pair
from perfit_cloud.model.base import BaseModel, PromptForm
from perfit_shared.errors import InvalidData
from perfit_shared.tasks import Task

__all__ = ["TOKEN_CAP", "Encoded", "Encoder"]

TOKEN_CAP = 2048  # longest example, tokens (OPPU's limit), or the model's context if that is less
_SHORTEST_PROMPT = 2  # tokens


class Encoded(NamedTuple):
    pair: Pair
    is_cut: bool  # the prompt lost its middle


class Encoder:
    """Makes prompts of a task's items, and cuts them to what the model takes."""

    def __init__(self, base: BaseModel, task: Task) -> None:
        unread = task.chat == "auto"  # by a caller who measures tokens alone
        self._base, self._task = base, task.resolved(base.has_chat_template) if unread else task
        self.cap = min(base.context, TOKEN_CAP)

    def example(self, item: Mapping[str, str]) -> Encoded | None:
        """An example to train on; None where its answer alone fills the context."""
        example = self._task.example(item)
        return self.encode(example.prompt, example.target)

    def examples(self, items: Iterable[Mapping[str, str]]) -> list[Encoded]:
        """Those that fit, in order."""
        return [found for item in items if (found := self.example(item)) is not None]

    def query(self, item: Mapping[str, str]) -> Encoded:
        """A held-out item, left whole unless it does not fit together with an answer. Raises InvalidData."""
        target = self._task.target(item)
        found = self.encode(self._task.prompt(item), target, self._task.answer_tokens)
        if found is None:
            ids = self._base.encode_pair(self._task.read_as("a"), target)[1]
            answer = max(self._task.answer_tokens, len(ids))
            raise InvalidData(f"no room for an answer of {answer} tokens in a context of {self.cap}")
        return found

    def encode(self, prompt: str, target: str, answer_tokens: int = 0) -> Encoded | None:
        """At most `cap` tokens with room for `answer_tokens`; None where the prompt keeps fewer than two.

        The middle of a long prompt is cut: the instruction stands at its start, and the answer's cue
        at its end. A target is never cut, since a model would learn to stop there.
        """
        return self.encode_read(self._task.read_as(prompt), target, answer_tokens)

    def encode_read(self, read: PromptForm, target: str, answer_tokens: int = 0) -> Encoded | None:
        """The same of what the model reads, as `Task.read_as` makes it."""
        ids, answer = self._base.encode_pair(read, target)
        room, length = self.cap - max(len(answer), answer_tokens), len(ids)
        if length > room >= _SHORTEST_PROMPT:
            ids = ids[: room // 2] + ids[length - (room - room // 2) :]
        return Encoded((ids, answer), len(ids) < length) if len(ids) <= room else None
