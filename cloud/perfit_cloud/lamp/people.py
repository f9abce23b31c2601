"""The test cohort as text: each user's history to learn from and held-out queries to answer.

`collective.encoding` makes tokens where they are needed: as ids, a history takes many times the memory of
its text. Reading encodes everybody once, person by person: to count, to leave out what does not fit, and
for a digest that shows whether another run had the same data.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from perfit_cloud.collective.encoding import Encoder
from perfit_cloud.engine.gradients.batch import Pair
from perfit_cloud.model.base import BaseModel
from perfit_shared.errors import InvalidData
from perfit_shared.json_input import error_context
from perfit_shared.lamp import Entry, Labels, User, Users, read_users
from perfit_shared.tasks import Task

__all__ = ["Learner", "People", "Person", "Query", "cohorts", "read_people", "swap_histories"]

# OPPU's release has another name for LaMP-7's.
HISTORY_FILES = ("user_top_100_history.json", "user_more_100_history.json")


@dataclass(frozen=True)
class Query:
    """One held-out query."""

    id: str
    gold: str  # the answer alone, as metrics compare it
    item: Mapping[str, str]  # the task's fields, the gold answer's included
    date: str = ""  # as the file has it; "" if it has none


@dataclass(frozen=True)
class Person:
    user_id: str
    history: tuple[Mapping[str, str], ...]  # the task's fields of every item, oldest first
    queries: tuple[Query, ...]
    dates: tuple[str, ...] = ()  # of every history item, as the file has them


@dataclass(frozen=True)
class Learner:
    """A person's history as tokens, for as long as they are trained on."""

    user_id: str
    history: tuple[Pair, ...]  # oldest first

    @classmethod
    def of(cls, person: Person, encoder: Encoder) -> Self:
        return cls(person.user_id, tuple(example.pair for example in encoder.examples(person.history)))

    @property
    def lengths(self) -> tuple[int, ...]:
        """Of each example, tokens of prompt and answer."""
        return tuple(len(prompt) + len(target) for prompt, target in self.history)


@dataclass(frozen=True)
class Counts:
    """What was left out or cut on the way."""

    dropped_empty: int  # entries with an empty field
    dropped_long: int  # history items whose answer fills the context
    shortened: int  # prompts cut to fit it, of history and queries
    without_queries: int  # users


@dataclass(frozen=True)
class People:
    """Everyone with a query, in the file's order."""

    people: tuple[Person, ...]
    counts: Counts
    token_cap: int  # of prompt and answer together
    digest: str  # sha-256 over all ids and tokens, hex
    empty_queries: tuple[Entry, ...]  # with an empty field, of the whole file; none where users are left out
    labels: Labels  # of the label file
    raw_ids: Mapping[str, str | int]  # of all queries, as the file has them
    asked: str = ""  # as `digest`, without histories

    @property
    def extra_labels(self) -> int:
        """Labels of no query in the file."""
        return len(self.labels.golds.keys() - self.raw_ids.keys())

    def raw_id(self, name: str) -> str | int:
        """A query's id as the label file has it, or where that has none, the queries' file."""
        return self.labels.raw_ids.get(name, self.raw_ids[name])


def read_people(
    folder: Path,
    task: Task,
    base: BaseModel,
    *,
    users: int | None = None,
    examples: int | None = None,
    queries: int | None = None,
) -> People:
    """The first `users` users of a folder's test cohort.

    Of each the latest `examples` of the history (all, or none for 0) and the first `queries` queries.

    Raises InvalidData naming file, item and field when a file is missing or malformed.
    """
    path = next((folder / name for name in HISTORY_FILES if (folder / name).is_file()), None)
    if path is None:
        raise InvalidData(f"{folder} holds no {HISTORY_FILES[0]}; `perfit-cloud lamp prepare` makes one")
    found = read_users(path, task)
    chosen = found.users[:users]
    reader = _Reader(Encoder(base, task), task, examples, queries)
    people = tuple(reader.person(user) for user in chosen if user.query)
    if not people:
        raise InvalidData(f"{path}: no user has a query with all fields of task {task.name}")
    left_out = len(chosen) - len(people)
    return People(
        people=people,
        counts=Counts(found.dropped_empty, reader.dropped_long, reader.shortened, left_out),
        token_cap=reader.encoder.cap,
        digest=reader.hash.hexdigest(),
        empty_queries=found.empty_queries if users is None and queries is None else (),
        labels=found.labels,
        raw_ids=_raw_ids(found),
        asked=reader.asked.hexdigest(),
    )


def _raw_ids(found: Users) -> dict[str, str | int]:
    queries = [*(entry for user in found.users for entry in user.query), *found.empty_queries]
    return {entry.id: entry.raw_id for entry in queries}


class _Reader:
    """Encodes person by person, counts, and keeps the text of what fits."""

    def __init__(self, encoder: Encoder, task: Task, examples: int | None, queries: int | None) -> None:
        self.encoder, self._task = encoder, task
        self._examples, self._queries = examples, queries
        self.dropped_long = self.shortened = 0
        self.hash, self.asked = hashlib.sha256(), hashlib.sha256()

    def person(self, user: User) -> Person:
        fitting = [(e, x) for e in user.profile if (x := self.encoder.example(e.item)) is not None]
        self.dropped_long += len(user.profile) - len(fitting)
        if self._examples is not None:
            fitting = fitting[len(fitting) - min(self._examples, len(fitting)) :]
        queries, encoded = [], []
        for entry in user.query[: self._queries]:
            with error_context(f"query {entry.id}"):
                encoded.append(self.encoder.query(entry.item))
            gold = entry.item[self._task.gold_field].strip()
            queries.append(Query(entry.id, gold, entry.item, entry.date))
        self.shortened += sum(encoded.is_cut for encoded in [*(x for _, x in fitting), *encoded])
        history = [example.pair for _, example in fitting]
        rows = [(q.id, q.gold, encoded.pair) for q, encoded in zip(queries, encoded, strict=True)]
        self.hash.update(json.dumps([user.user_id, history, rows]).encode())
        self.asked.update(json.dumps([user.user_id, rows]).encode())
        past, dates = tuple(e.item for e, _ in fitting), tuple(e.date for e, _ in fitting)
        return Person(user.user_id, past, tuple(queries), dates)


def swap_histories(people: Sequence[Person]) -> tuple[Person, ...]:
    """Everyone with the history of the next one (the last with the first's): a control of ours."""
    after = [*people[1:], people[0]]
    return tuple(
        replace(person, history=other.history, dates=other.dates)
        for person, other in zip(people, after, strict=True)
    )


def cohorts(people: Sequence[Person], size: int) -> list[list[Person]]:
    """Users with histories of like length together, so that few wait for the longest of them."""
    order = sorted(people, key=lambda person: len(person.history), reverse=True)
    return [order[start : start + size] for start in range(0, len(order), size)]
