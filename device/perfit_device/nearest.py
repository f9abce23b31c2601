"""Own examples that stand before a question: those nearest to it, found on the device.

The cloud sees their text as part of the prompt, as it sees the question's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from perfit_device import history
from perfit_shared.retrieval import Retriever, entry_text, input_text

if TYPE_CHECKING:
    from perfit_device.history import HistoryItem
    from perfit_device.profile import Profile
    from perfit_shared.tasks import Task

__all__ = ["nearest_examples"]

# The cloud counts tokens and a device has no tokenizer: as few bytes a token leave room in every language.
_BYTES_A_TOKEN = 2


def nearest_examples(
    profile: Profile, task: Task, asked: HistoryItem, count: int, *, tokens: int
) -> list[str]:
    """At most `count` examples as lines, nearest first, without the question itself.

    One that does not fit into a prompt of so many tokens beside those before it is left out. Raises
    InvalidData where the question lacks a field of the task.
    """
    if not count:
        return []
    with profile.vault() as vault:
        items = history.load(vault, task.name)
    items = profile.usable(items, task)
    inputs = [input_text(task, item.fields) for item in items]
    room = _BYTES_A_TOKEN * tokens - len(task.prompt(asked.fields).encode())
    own = input_text(task, asked.fields)
    found: list[str] = []
    for index in Retriever(inputs).best(own, len(inputs)):
        line = entry_text(task, items[index].fields)
        size = len(line.encode()) + 1
        if inputs[index] != own and size <= room and len(found) < count:
            found.append(line)
            room -= size
    return found
