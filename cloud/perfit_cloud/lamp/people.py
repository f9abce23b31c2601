"""The test cohort as token pairs: each user's history to train on and held-out queries to answer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from perfit_cloud.collective.data import TOKEN_CAP, fit
from perfit_cloud.engine.gradients.batch import Pair
from perfit_cloud.model.base import BaseModel
from perfit_shared.errors import InvalidData
from perfit_shared.lamp import Entry, Labels, User, Users, read_users
from perfit_shared.tasks import Task

__all__ = ["People", "Person", "Question", "read_people", "swap_histories"]

# OPPU's release has another name for LaMP-7's.
HISTORY_FILES = ("user_top_100_history.json", "user_more_100_history.json")


@dataclass(frozen=True)
class Question:
    """One held-out query."""

    id: str
    gold: str  # the answer alone, as metrics compare it
    pair: Pair  # prompt ids, and the ids of the gold answer as it would follow them


@dataclass(frozen=True)
class Person:
    user_id: str
    history: tuple[Pair, ...]  # oldest first
    questions: tuple[Question, ...]

    @property
    def lengths(self) -> tuple[int, ...]:
        """Of each example, tokens of prompt and answer."""
        return tuple(len(prompt) + len(target) for prompt, target in self.history)


@dataclass(frozen=True)
class People:
    """Everyone with a query, in the file's order, and what was left out or cut on the way."""

    people: tuple[Person, ...]
    dropped_empty: int  # entries with an empty field
    dropped_long: int  # history examples whose answer fills the context
    shortened: int  # prompts cut to fit it, of history and queries
    token_cap: int  # of prompt and answer together
    without_queries: int  # users
    empty_queries: tuple[Entry, ...]  # with an empty field, of the whole file; none where users are left out
    labels: Labels  # of the label file
    raw_ids: Mapping[str, str | int]  # of all queries, as the file has them
    extra_labels: int  # of no query in the file

    def raw_id(self, name: str) -> str | int:
        """A query's id as the label file has it, or where that has none, the queries' file."""
        return self.labels.raw_ids.get(name, self.raw_ids[name])

    def digest(self) -> str:
        """sha-256 over all ids and tokens, hex."""
        h = hashlib.sha256()
        for person in self.people:
            questions = [(q.id, q.gold, q.pair) for q in person.questions]
            h.update(json.dumps([person.user_id, person.history, questions]).encode())
        return h.hexdigest()


def read_people(folder: Path, task: Task, base: BaseModel, *, users: int | None = None) -> People:
    """The first `users` users of a folder's test cohort.

    Raises InvalidData naming file, item and field when a file is missing or malformed.
    """
    path = next((folder / name for name in HISTORY_FILES if (folder / name).is_file()), None)
    if path is None:
        raise InvalidData(f"{folder} holds no {HISTORY_FILES[0]}; `perfit-cloud lamp prepare` makes one")
    found = read_users(path, task)
    chosen = found.users[:users]
    reader = _Reader(base, task)
    people = tuple(reader.person(user) for user in chosen if user.query)
    if not people:
        raise InvalidData(f"{path}: no user has a query with all fields of task {task.name}")
    return People(
        people=people,
        dropped_empty=found.dropped_empty,
        dropped_long=reader.dropped_long,
        shortened=reader.shortened,
        token_cap=reader.cap,
        without_queries=len(chosen) - len(people),
        empty_queries=found.empty_queries if users is None else (),
        labels=found.labels,
        raw_ids=(ids := _raw_ids(found)),
        extra_labels=len(found.labels.golds.keys() - ids.keys()),
    )


def _raw_ids(found: Users) -> dict[str, str | int]:
    queries = [*(entry for user in found.users for entry in user.query), *found.empty_queries]
    return {entry.id: entry.raw_id for entry in queries}


class _Reader:
    """Turns entries into tokens and counts what does not fit."""

    def __init__(self, base: BaseModel, task: Task) -> None:
        self._base, self._task = base, task
        self.cap = min(base.context, TOKEN_CAP)
        self.dropped_long = self.shortened = 0

    def person(self, user: User) -> Person:
        history = tuple(pair for entry in user.profile if (pair := self._example(entry)) is not None)
        return Person(user.user_id, history, tuple(self._question(entry) for entry in user.query))

    def _example(self, entry: Entry) -> Pair | None:
        example = self._task.example(entry.item)
        pair = self._fit(example.prompt, self._base.encode_target(example.target), self.cap)
        self.dropped_long += pair is None
        return pair

    def _question(self, entry: Entry) -> Question:
        """Test articles are left whole, unless they would not fit the model together with an answer."""
        gold = entry.item[self._task.gold_field]
        target = self._base.encode_target(self._task.target(entry.item))
        answer = max(self._task.answer_tokens, len(target))
        pair = self._fit(self._task.prompt(entry.item), target, self.cap - (answer - len(target)))
        if pair is None:
            raise InvalidData(
                f"query {entry.id}: no room for an answer of {answer} tokens in a context of {self.cap}"
            )
        return Question(entry.id, gold.strip(), pair)

    def _fit(self, text: str, target: list[int], cap: int) -> Pair | None:
        prompt = self._base.encode_chat([("user", text)]) if self._task.chat else self._base.encode(text)
        pair = fit(prompt, target, cap=cap)
        self.shortened += pair is not None and len(pair[0]) < len(prompt)
        return pair


def swap_histories(people: Sequence[Person]) -> tuple[Person, ...]:
    """Everyone with the history of the next one (the last with the first's): the control of Table 15."""
    after = [*people[1:], people[0]]
    return tuple(replace(person, history=other.history) for person, other in zip(people, after, strict=True))
