"""Own examples that stand before a question: those nearest to it, found on the device.

The cloud sees their text as part of the prompt, as it sees the question's.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from functools import cached_property
from typing import TYPE_CHECKING

from perfit_device import history, personal
from perfit_shared.retrieval import Retriever, input_text, read_after
from perfit_shared.types import Mode

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from perfit_device.cloud.codec import Artefact
    from perfit_device.history import HistoryItem
    from perfit_device.profile import Profile
    from perfit_device.settings import DeviceSettings
    from perfit_shared.tasks import Task

__all__ = ["NearestExamples", "examples_before", "examples_of_task", "nearest_examples"]

_EXAMPLES = 4  # docs/research.md, a newcomer
_SEARCHED = 2_000  # the newest: an index of them takes a fifth of a second
_TRIED = 4  # times as many as are wanted; a longer one than fits costs one

# The cloud counts tokens and a device has no tokenizer: as few bytes a token leave room in every language.
_BYTES_A_TOKEN = 2
_TURN_TOKENS = 8  # of a chat template around a turn, and of a line's end


def examples_of_task(settings: DeviceSettings, task: Task, trained_behind: int | None = None) -> int:
    """How many stand before what an update learns, and before a question.

    The config file says it, else the shift that answers, which was trained behind so many, else the task.
    That was measured on commit messages and headlines: texts of one line, by a model that reads chats. Of
    longer replies a small model makes loops. A talk has its own turns.
    """
    if task.is_talk:
        return 0
    said = settings.examples()
    if said is not None or trained_behind is not None:
        return said if said is not None else trained_behind or 0
    writes_lines = task.chat is True and "\n" in task.stop and not task.labels
    return _EXAMPLES if writes_lines else 0


def examples_before(profile: Profile, artefact: Artefact, mode: Mode) -> int:
    """How many stand before a question of which nobody says it: as many as the shift was trained behind."""
    if mode is not Mode.PERSONAL:
        return 0
    _, info = profile.connect()
    with profile.vault() as vault:
        versions = personal.read_versions(vault, info.cloud_id, artefact.name)
    return examples_of_task(profile.settings, artefact.task, versions.now.behind if versions else None)


class NearestExamples:
    """Own examples, searchable: those nearest to an item stand before it.

    An item is never among its own, nor is one that reads as it does. One that does not fit into a prompt of
    `tokens` tokens beside those before it is left out.
    """

    def __init__(
        self,
        task: Task,
        items: Sequence[HistoryItem],
        count: int,
        *,
        tokens: int,
        refused: Mapping[str, int] | None = None,
    ) -> None:
        """`count`: at most so many. `refused`: names of items that the cloud does not take behind so many."""
        self._task, self._tokens, self._refused = task, tokens, refused or {}
        self._items = sorted(items, key=lambda item: (item.date, item.order))[-_SEARCHED:]
        self.count = count if items else 0
        self._found: dict[str, list[Mapping[str, str]]] = {}  # by name: an update asks for each often

    def before(self, item: HistoryItem) -> list[Mapping[str, str]]:
        """Nearest first. The item has the fields of the task."""
        if not self.count or self._refused.get(item.name, self.count + 1) <= self.count:
            return []
        if item.name not in self._found:
            self._found[item.name] = self._nearest(item)
        return self._found[item.name]

    def _nearest(self, item: HistoryItem) -> list[Mapping[str, str]]:
        task, own = self._task, input_text(self._task, item.fields)
        others = (i for i in self._retriever.best(own, len(self._items)) if self._inputs[i] != own)
        found: list[Mapping[str, str]] = []
        for index in itertools.islice(others, _TRIED * self.count):
            more = [*found, self._items[index].fields]
            if _most_tokens(read_after(task, more, item.fields)) <= self._tokens:
                found = more
            if len(found) == self.count:
                break
        return found

    @cached_property
    def _inputs(self) -> list[str]:
        return [input_text(self._task, item.fields) for item in self._items]

    @cached_property
    def _retriever(self) -> Retriever:
        return Retriever(self._inputs)

    def digest(self, items: Iterable[HistoryItem]) -> str:
        """sha-256 over what these items are read behind, hex; "" where it is nothing."""
        read = [[sorted(fields.items()) for fields in self.before(item)] for item in items]
        return hashlib.sha256(json.dumps(read).encode()).hexdigest() if any(read) else ""

    def tokens(self, items: Iterable[HistoryItem]) -> int:
        """What these items take together behind their own, at most, without their answers."""
        return sum(_most_tokens(read_after(self._task, self.before(i), i.fields, cut=True)) for i in items)


def nearest_examples(
    profile: Profile, task: Task, asked: HistoryItem, count: int, *, tokens: int
) -> list[Mapping[str, str]]:
    """Those of the history that stand before a question. Raises InvalidData where it lacks a field."""
    task.prompt(asked.fields)  # raises
    if not count:
        return []
    with profile.vault() as vault:
        items = history.load(vault, task.name)
    return NearestExamples(task, profile.usable(items, task), count, tokens=tokens).before(asked)


def _most_tokens(read: str | list[tuple[str, str]]) -> int:
    """At most so many, roughly."""
    turns = [read] if isinstance(read, str) else [content for _role, content in read]
    return sum(len(turn.encode()) // _BYTES_A_TOKEN + _TURN_TOKENS for turn in turns)
