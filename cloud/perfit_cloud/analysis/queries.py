"""Users one after another, with their queries and the entries of their own history nearest to each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from perfit_cloud.collective.streaming import each_user
from perfit_shared.errors import InvalidData, InvalidInput
from perfit_shared.lamp import Entry, User
from perfit_shared.retrieval import Retriever, entry_text
from perfit_shared.tasks import Task

__all__ = ["AskingUser", "QueryOptions", "Question", "asking_users", "count_questions", "find_users"]

# The test cohort first; OPPU's release has another name for LaMP-7's.
_FILES = ("user_top_100_history.json", "user_more_100_history.json", "user_others.json", "questions.json")
_MOST_RETRIEVED, _MOST_QUERIES = 64, 10_000


@dataclass(frozen=True)
class QueryOptions:
    retrieved: int = 4  # entries of the history before a query
    most: int = 32  # queries of a user; the first ones, of history items the latest

    def __post_init__(self) -> None:
        if not 1 <= self.retrieved <= _MOST_RETRIEVED:
            raise InvalidInput(f"entries retrieved should be from 1 to {_MOST_RETRIEVED}")
        if not 1 <= self.most <= _MOST_QUERIES:
            raise InvalidInput(f"queries of a user should be from 1 to {_MOST_QUERIES:,}")


@dataclass(frozen=True)
class Question:
    prompt: str  # the task's template, filled; never cut
    history: str  # the nearest entries, nearest first, each in a line


@dataclass(frozen=True)
class AskingUser:
    number: int  # in the file, from 0
    user_id: str
    questions: tuple[Question, ...]  # at least one
    entries: int  # of the history


def find_users(path: Path) -> Path:
    """The file that `path` names: itself, or the folder's test cohort, else its other users.

    Raises InvalidData when there is none.
    """
    if path.is_file():
        return path
    found = next((path / name for name in _FILES if (path / name).is_file()), None)
    if found is None:
        raise InvalidData(f"{path} holds none of {', '.join(_FILES)}; `perfit-cloud lamp prepare` makes them")
    return found


def asking_users(
    path: Path, task: Task, options: QueryOptions, *, users: int | None = None
) -> Iterator[AskingUser]:
    """Those of the first `users` users of a file who have a query and a history for it, one at a time.

    A user without queries asks with history items. Raises InvalidData when the file is malformed.
    """
    for number, found in enumerate(islice(each_user(path, task), users)):
        questions = _questions(found.users[0], task, options)
        if questions:
            yield AskingUser(number, found.users[0].user_id, questions, len(found.users[0].profile))


def count_questions(path: Path, task: Task, options: QueryOptions, *, users: int | None = None) -> int:
    """At most how many questions `asking_users` gives."""
    found = islice(each_user(path, task), users)
    return sum(
        min(len(u.query or u.profile), options.most) for each in found for u in each.users if u.profile
    )


def _questions(user: User, task: Task, options: QueryOptions) -> tuple[Question, ...]:
    asked = user.query[: options.most] or user.profile[-options.most :]
    if not asked or not user.profile:
        return ()
    texts = [entry_text(task, entry.item) for entry in user.profile]
    prompts = [task.prompt(entry.item) for entry in user.profile]
    retriever = Retriever(texts)
    questions = []
    for query in asked:
        prompt = task.prompt(query.item)
        ranked = retriever.best(_asked_text(task, query), len(texts))
        # A query is never in its own history, by its id or by all that it is asked with.
        own = [i for i in ranked if user.profile[i].id != query.id and prompts[i] != prompt]
        if own:
            questions.append(Question(prompt, "\n".join(texts[i] for i in own[: options.retrieved])))
    return tuple(questions)


def _asked_text(task: Task, query: Entry) -> str:
    """What a query is asked with; of an item that has fewer fields, what is there."""
    return " ".join(query.item[name] for name in task.template_fields if name in query.item)
