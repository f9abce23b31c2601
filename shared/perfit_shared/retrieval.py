"""The entries of a history that are nearest to a query, by BM25 (Robertson and Zaragoza, 2009; bm25s).

Both sides put them before a query in the same form: `perfit ask --examples`, and the pipeline's methods.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence

from perfit_shared.tasks import Task

__all__ = ["MOST_EXAMPLES", "Retriever", "entry_text", "input_text", "read_after"]

MOST_EXAMPLES = 64  # before a query
_WORD = re.compile(r"\w+")
_FIELD_WORDS = 768  # of an entry's field, as OPPU cuts it
_LIBRARY = logging.getLogger("bm25s")


def entry_text(task: Task, item: Mapping[str, str], *, words: int = _FIELD_WORDS) -> str:
    """An entry before a query as OPPU writes it, "abstract: … title: …", the answer last, in one line.

    A field that is called "text" has the word that LaMP's queries mark it by ("article: "). Every field
    is cut to so many words.
    """
    marker = task.marker.strip().removesuffix(":")
    fields = [*(name for name in task.fields_of(item) if name != task.gold_field), task.gold_field]
    labels = [marker if marker and name == "text" else name for name in fields]
    return " ".join(
        f"{label}: {' '.join(item[name].split(maxsplit=words)[:words])}"
        for label, name in zip(labels, fields, strict=True)
    )


def read_after(
    task: Task,
    examples: Sequence[Mapping[str, str]],
    item: Mapping[str, str],
    *,
    cut: bool = False,
    of: Task | None = None,
) -> str | list[tuple[str, str]]:
    """What a model reads of an item behind these examples, which are nearest first.

    In a chat every example is a turn of the user and the reply to it, the nearest next to the question. In a
    text they are lines as OPPU writes them, the nearest first. `cut` is the item's, as `Task.prompt` has it;
    `of` is the task of the examples, where that is another.
    """
    own = of or task
    read = task.read_as(task.prompt(item, cut=cut))
    if isinstance(read, str):
        return "\n".join([*(entry_text(own, example) for example in examples), read])
    said = [turn for example in reversed(examples) for turn in _turns(own, example)]
    return [*read[:-1], *said, read[-1]]


def _turns(task: Task, example: Mapping[str, str]) -> tuple[tuple[str, str], tuple[str, str]]:
    return ("user", task.prompt(example, cut=True)), ("assistant", task.target(example, cut=True))


def input_text(task: Task, item: Mapping[str, str]) -> str:
    """The input side alone; of an example that has none, as LaMP-7's tweets, the text itself."""
    fields = [name for name in task.fields_of(item) if name != task.gold_field]
    return " ".join(item[name] for name in fields or [task.gold_field])


class Retriever:
    """Index of one person's texts. Words are compared in lower case; k1 = 1.5, b = 0.75 (the library's)."""

    def __init__(self, texts: Sequence[str]) -> None:
        self._words = [_words(text) for text in texts]
        self._index = None
        if any(self._words):
            import bm25s

            if _LIBRARY.level != logging.WARNING:  # its own level is DEBUG; setting one is slow each time
                _LIBRARY.setLevel(logging.WARNING)
            self._index = bm25s.BM25()
            self._index.index(self._words, show_progress=False)

    def best(self, query: str, k: int) -> list[int]:
        """Indices of the k nearest texts, best first; of equally near ones the latest first.

        Fewer where there are fewer texts. One that shares no word with the query comes after all that do.
        """
        scores = [0.0] * len(self._words)
        words = _words(query)
        if self._index is not None and words:
            scores = self._index.get_scores(words).tolist()
        return sorted(range(len(scores)), key=lambda i: (-scores[i], -i))[:k]


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())
