"""Texts of a person before a query, in OPPU's form: "abstract: … title: …", a line for each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from perfit_cloud.engine.gradients.batch import Pair
from perfit_cloud.lamp.methods.interface import TaskData

__all__ = ["prefixed_pair"]


def prefixed_pair(data: TaskData, texts: Sequence[str], item: Mapping[str, str]) -> Pair:
    """The query's prompt behind these texts, in a chat inside the user's turn, and its answer.

    The query is never cut for them: a text that does not fit beside those before it is left out.
    """
    task, encoder = data.task, data.encoder
    plain = encoder.query(item)
    if plain.is_cut:
        return plain.pair
    prompt, target = task.prompt(item), task.target(item)
    found, kept = plain.pair, list[str]()
    for text in texts:
        whole = encoder.encode("\n".join([*kept, text, prompt]), target, task.answer_tokens)
        if whole is not None and not whole.is_cut:
            found, kept = whole.pair, [*kept, text]
    return found
