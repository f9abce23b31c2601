"""The tasks that perfit knows, and those that a folder's task.json defines.

The instruction texts of LaMP's tasks are its own, with the answer's cue after them; OPPU's, which the
paper uses, are in `prompts`. A task.json overrides a task, or defines one of its own (docs/tasks.md).
"""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from perfit_shared.errors import InvalidData, NotFound
from perfit_shared.task import TASK_NAME, Example, Task

__all__ = ["TASKS", "TASK_NAME", "Example", "Task", "differing_keys", "load_task", "task_named"]

_NEWS = (
    "food & drink",
    "sports",
    "education",
    "parents",
    "religion",
    "travel",
    "business",
    "crime",
    "science & technology",
    "culture & arts",
    "entertainment",
    "politics",
    "women",
    "style & beauty",
    "healthy living",
)
# The same in the order of OPPU's instruction.
_NEWS_ASKED = (
    "travel",
    "education",
    "parents",
    "style & beauty",
    "entertainment",
    "food & drink",
    "science & technology",
    "business",
    "sports",
    "healthy living",
    "women",
    "politics",
    "crime",
    "culture & arts",
    "religion",
)
_TAGS = (
    "sci-fi",
    "based on a book",
    "comedy",
    "action",
    "twist ending",
    "dystopia",
    "dark comedy",
    "classic",
    "psychology",
    "fantasy",
    "romance",
    "thought-provoking",
    "social commentary",
    "violence",
    "true story",
)

_CATEGORY = (
    "Which category does this article relate to among the following categories? Just answer with the "
    f"category name without further explanation. categories: [{', '.join(_NEWS_ASKED)}] article: {{text}}"
)
_TAG = (
    "Which tag does this movie relate to among the following tags? Just answer with the tag name without "
    f"further explanation. tags: [{', '.join(_TAGS)}] description: {{description}}"
)
_SCORE = (
    "What is the score of the following review on a scale of 1 to 5? just answer with 1, 2, 3, 4, or 5 "
    "without further explanation. review: {text}"
)
_HEADLINE = "Generate a headline for the following article: {text}"
_TITLE = "Generate a title for the following abstract of a paper: {abstract}"
_PARAPHRASE = "Paraphrase the following tweet without any explanation before or after it: {input}"
# Frequency penalties against loops: docs/results.md.
_ON_LINES, _ON_REPLIES = 1.0, 0.4


def _lamp(
    name: str,
    asked: str,
    field: str,
    metric: str,
    marker: str,
    *,
    lamp: str,
    answer_tokens: int = 48,
    labels: tuple[str, ...] = (),
    history_template: str = "",
    cue: str = "",
    frequency_penalty: float = 0.0,
) -> Task:
    """LaMP's question with the answer's cue behind it; as a chat turn, the question alone."""
    return Task(
        name,
        f"{asked} {cue or field}:",
        f" {{{field}}}",
        metric,
        marker,
        labels,
        answer_tokens=answer_tokens,
        lamp=lamp,
        chat="auto",
        history_template=history_template,
        chat_template=asked,
        frequency_penalty=frequency_penalty,
    )


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        _lamp(
            "news_categorize",
            _CATEGORY,
            "category",
            "accuracy",
            "article: ",
            labels=_NEWS,
            answer_tokens=12,
            lamp="LaMP_2N",
        ),
        _lamp(
            "movie_tagging",
            _TAG,
            "tag",
            "accuracy",
            "description: ",
            labels=_TAGS,
            answer_tokens=12,
            lamp="LaMP_2M",
        ),
        _lamp(
            "product_rating",
            _SCORE,
            "score",
            "mae",
            "review: ",
            labels=("1", "2", "3", "4", "5"),
            answer_tokens=4,
            lamp="LaMP_3",
        ),
        _lamp(
            "news_headline",
            _HEADLINE,
            "title",
            "rouge_1",
            "article: ",
            lamp="LaMP_4",
            cue="headline",
            frequency_penalty=_ON_LINES,
        ),
        _lamp("scholarly_title", _TITLE, "title", "rouge_1", "paper: ", lamp="LaMP_5", answer_tokens=64),
        _lamp(
            "tweet_paraphrase",
            _PARAPHRASE,
            "text",
            "rouge_1",
            "after it: ",
            lamp="LaMP_7",
            answer_tokens=96,
            history_template="tweet:",
            cue="tweet",
        ),
        Task(
            "commit_message",
            "Changes: {changes}\nCommit message:",
            " {message}",
            "rouge_1",
            "changes: ",
            chat="auto",
            chat_template="Write a one-line commit message for these changes: {changes}",
            frequency_penalty=_ON_LINES,
        ),
        Task(
            "reply",
            "Message: {message}\nReply:",
            " {reply}",
            "rouge_1",
            "message: ",
            stop=("\nMessage:",),  # a plain model may go on with the next message; a reply may have lines
            answer_tokens=128,
            chat="auto",
            chat_template="Write a reply to this message: {message}",
            frequency_penalty=_ON_REPLIES,
        ),
        Task("chat", "{prompt}", "{reply}", "rouge_1", stop=(), answer_tokens=256, chat=True),
    )
}

_LARGEST = 1 << 20  # bytes of a task.json
_NEEDED = ("template", "answer", "metric")  # of a task that is none of TASKS


def task_named(name: str) -> Task:
    """Raises NotFound and lists what there is."""
    if name not in TASKS:
        raise NotFound(
            f'no task "{name[:40]}"; there are {", ".join(TASKS)}, and those that a task.json defines'
        )
    return TASKS[name]


def load_task(folder: Path, name: str | None = None) -> Task:
    """The task called `name`, or the one that `folder/task.json` names.

    The file overrides one of TASKS, or defines a task of its own. A template without a `chat_template`
    replaces both of a built-in. Raises NotFound where neither says what the task is, InvalidData naming the
    file when it is malformed, for another task, or lacks what a task of its own needs.
    """
    path = folder / "task.json"
    if not path.is_file():
        if name is None:
            raise NotFound(f"say which task with --task NAME, since {folder} holds no task.json")
        return task_named(name)
    try:
        given = _read(path)
        own = given.pop("task", name)
        if not isinstance(own, str):
            raise InvalidData(
                'it names no task; add "task": "NAME"' if own is None else "its task is no text"
            )
        if name not in (None, own):
            raise InvalidData(f'it is for another task, "{own[:40]}"')
        if unknown := given.keys() - {f.name for f in fields(Task)} | given.keys() & {"name"}:
            raise InvalidData(f"unknown keys: {', '.join(sorted(unknown))[:80]}")
        if own in TASKS:
            reworded = {"chat_template": ""} if "template" in given or given.get("chat") is False else {}
            return replace(TASKS[own], **reworded | given)
        if missing := [key for key in _NEEDED if key not in given]:
            raise InvalidData(
                f'"{own[:40]}" is none of perfit\'s tasks, so it also needs {", ".join(missing)}'
            )
        return Task(own, **given)
    except (OSError, ValueError, TypeError, RecursionError, InvalidData) as error:
        raise InvalidData(f"{path}: {error}") from error


def _read(path: Path) -> dict[str, Any]:
    """The object in a file. Raises InvalidData where it is too large, or holds a key twice."""

    def of_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            raise InvalidData("a key stands in it twice")
        return values

    with path.open("rb") as file:
        data = file.read(_LARGEST + 1)
    if len(data) > _LARGEST:
        raise InvalidData("it has more than 1 MiB")
    values = json.loads(data.decode(), object_pairs_hook=of_pairs)
    if not isinstance(values, dict):
        raise InvalidData("it holds no JSON object")
    return values


def differing_keys(folder: Path, task: Task) -> list[str]:
    """What `folder/task.json` gives in another way than `task`, a resolved one, has it, by key.

    Raises as `load_task`.
    """
    path = folder / "task.json"
    if not path.is_file():
        return []
    theirs = load_task(folder, task.name).resolved(bool(task.chat))
    keys = [key for key in _read(path) if key != "task"]
    held_as = {"chat_template": "template"}  # once a task is resolved

    def differs(key: str) -> bool:
        name = held_as.get(key, key)
        return bool(getattr(theirs, name) != getattr(task, name))

    return list(filter(differs, keys))
