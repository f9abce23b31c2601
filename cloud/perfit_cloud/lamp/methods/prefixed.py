"""What stands before a query's prompt: texts on a person, or examples of theirs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from perfit_cloud.engine.gradients.batch import Pair
from perfit_cloud.lamp.methods.interface import TaskData
from perfit_cloud.model.base import PromptForm
from perfit_shared.retrieval import read_after
from perfit_shared.tasks import Task

__all__ = ["examples_as", "pair_after", "prefixed_pair"]

_Part = TypeVar("_Part")


def examples_as(task: Task) -> str:
    """How `read_after` writes examples, in a word."""
    return "turns" if task.chat is True else "lines"


def prefixed_pair(data: TaskData, texts: Sequence[str], item: Mapping[str, str]) -> Pair:
    """The query's prompt behind these texts, in a chat inside the user's turn, and its answer."""
    prompt = data.task.prompt(item)
    return _filled(data, texts, item, lambda kept: data.task.read_as("\n".join([*kept, prompt])))


def pair_after(
    data: TaskData, of: Task, examples: Sequence[Mapping[str, str]], item: Mapping[str, str]
) -> Pair:
    """The query's prompt behind these examples of a task, nearest first, by `read_after`, and its answer."""
    return _filled(data, examples, item, lambda kept: read_after(data.task, kept, item, of=of))


def _filled(
    data: TaskData, parts: Sequence[_Part], item: Mapping[str, str], read: Callable[[list[_Part]], PromptForm]
) -> Pair:
    """The query is never cut: a part that does not fit beside those before it is left out."""
    task, encoder = data.task, data.encoder
    plain = encoder.query(item)
    if plain.is_cut:
        return plain.pair
    target = task.target(item)
    found, kept = plain.pair, list[_Part]()
    for part in parts:
        whole = encoder.encode_read(read([*kept, part]), target, task.answer_tokens)
        if whole is not None and not whole.is_cut:
            found, kept = whole.pair, [*kept, part]
    return found
