"""Own examples that stand before a question: those nearest to it, found on the device.

The cloud sees their text as part of the prompt, as it sees the question's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from perfit_device import history
from perfit_shared.retrieval import Retriever, input_text, read_after
from perfit_shared.types import Mode

if TYPE_CHECKING:
    from collections.abc import Mapping

    from perfit_device.cloud.codec import Artefact
    from perfit_device.history import HistoryItem
    from perfit_device.profile import Profile
    from perfit_shared.tasks import Task

__all__ = ["examples_before", "nearest_examples"]

_FIRST_EXAMPLES = 4  # before a question of somebody without an update: docs/research.md, a newcomer

# The cloud counts tokens and a device has no tokenizer: as few bytes a token leave room in every language.
_BYTES_A_TOKEN = 2
_TURN_TOKENS = 8  # of a chat template around a turn, and of a line's end


def examples_before(profile: Profile, artefact: Artefact, mode: Mode) -> int:
    """How many stand before a question of which nobody says it: some where no update knows them yet.

    That was measured on commit messages and headlines: texts of one line, by a model that reads chats. Of
    longer replies a small model makes loops.
    """
    task = artefact.task
    writes_lines = task.chat is True and "\n" in task.stop and not task.labels
    is_first = mode is Mode.PERSONAL and profile.encoded_shift(artefact) is None
    return _FIRST_EXAMPLES if writes_lines and is_first else 0


def nearest_examples(
    profile: Profile, task: Task, asked: HistoryItem, count: int, *, tokens: int
) -> list[Mapping[str, str]]:
    """At most `count` examples, nearest first, without the question itself.

    One that does not fit into a prompt of so many tokens beside those before it is left out. Raises
    InvalidData where the question lacks a field of the task.
    """
    task.prompt(asked.fields)  # raises
    if not count:
        return []
    with profile.vault() as vault:
        items = history.load(vault, task.name)
    items = profile.usable(items, task)
    inputs = [input_text(task, item.fields) for item in items]
    own = input_text(task, asked.fields)
    found: list[Mapping[str, str]] = []
    for index in Retriever(inputs).best(own, len(inputs)):
        more = [*found, items[index].fields]
        if inputs[index] != own and _most_tokens(read_after(task, more, asked.fields)) <= tokens:
            found = more
        if len(found) == count:
            break
    return found


def _most_tokens(read: str | list[tuple[str, str]]) -> int:
    """At most so many, roughly."""
    turns = [read] if isinstance(read, str) else [content for _role, content in read]
    return sum(len(turn.encode()) // _BYTES_A_TOKEN + _TURN_TOKENS for turn in turns)
