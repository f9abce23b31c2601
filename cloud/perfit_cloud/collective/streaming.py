"""LaMP's and OPPU's files of gigabytes, read person by person: what nobody trains on is never held.

Parsed as a whole, a file takes several times its size. A first look over it settles what holds for the
file; a second keeps of each person the entries that stage 1 trains on.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ijson

from perfit_shared.errors import InvalidData
from perfit_shared.lamp import at, labels_beside, read_golds, users_of
from perfit_shared.tasks import Task

__all__ = ["Streamed", "stream_users"]

Entries = dict[str, list[dict[str, str]]]  # the task's fields of every item, by user id
Streamed = tuple[str, Entries, int]  # "query" or "profile", the entries, items with an empty field


def stream_users(path: Path, task: Task) -> Streamed:
    """What `read_users(path, task).to_train_on()` gives, without the rest of the file in memory.

    Raises InvalidData on whatever is malformed; its message may be less exact than `read_users`'.
    """
    labels = labels_beside(path)
    golds = {} if labels is None else read_golds(labels)
    aside = _leaves_profiles_aside(path, task)
    queries: Entries = {}
    profiles: Entries = {}
    seen: set[str] = set()
    asked: set[str] = set()
    dropped = 0
    with at(str(path)):
        for record in _records(path):
            found = users_of(
                [{**record, "profile": []} if aside else record], task, golds=golds, source=path.name
            )
            dropped += found.dropped_empty
            (user,) = found.users
            names = [entry.id for entry in (*user.query, *found.empty_queries)]
            if user.user_id in seen or not asked.isdisjoint(names):
                raise InvalidData(f"user {user.user_id[:40]} or one of the queries is there twice")
            seen.add(user.user_id)
            asked.update(names)
            if user.query and not found.held_out:
                profiles.clear()  # queries are trained on where there are any
                queries[user.user_id] = [dict(entry.item) for entry in user.query]
            elif user.profile and not queries:
                profiles[user.user_id] = [dict(entry.item) for entry in user.profile]
    return ("query", queries, dropped) if queries else ("profile", profiles, dropped)


def _records(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file's list, one at a time."""
    try:
        with path.open("rb") as file:
            yield from ijson.items(file, "item", use_float=True)
    except (OSError, ijson.JSONError, UnicodeDecodeError) as error:
        raise InvalidData("not JSON in UTF-8") from error


def _leaves_profiles_aside(path: Path, task: Task) -> bool:
    """Whether no profile item has the task's fields, while queries do the same service (as `users_of`)."""
    some = asked = False
    with at(str(path)):
        for record in _records(path):
            if not isinstance(record, dict):
                raise InvalidData("it should be a list of users with user_id, profile and query")
            items = record.get("profile")
            for item in items if isinstance(items, list) else []:
                some = True
                if isinstance(item, dict) and set(task.fields_of(item)) <= item.keys():
                    return False
            asked |= bool(record.get("query")) or "input" in record
    return some and asked
