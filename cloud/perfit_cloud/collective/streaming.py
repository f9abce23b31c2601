"""LaMP's and OPPU's files of gigabytes, read person by person, holding only what is trained on.

Parsed as a whole, a file takes several times its size. A first look over it settles what holds for the
file; a second keeps of each person the entries that stage 1 trains on, and the latest of the longest
profiles, on which the devices' rates are tried.
"""

from __future__ import annotations

import codecs
import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ijson

from perfit_cloud.collective.items import Items, source_of
from perfit_shared.errors import InvalidData
from perfit_shared.json_input import error_context
from perfit_shared.lamp import Entry, Users, labels_beside, read_golds, users_of
from perfit_shared.tasks import Task

__all__ = ["each_user", "stream_users"]

_PROFILES = 512  # kept for trial updates; enough that some people are not trained on

Entries = dict[str, list[dict[str, str]]]  # the task's fields of every item, by user id


@dataclass
class _Longest:
    """The latest items of the longest profiles, as many as `_PROFILES`."""

    latest: int  # items of each
    profiles: Entries = field(default_factory=dict)
    _sizes: list[tuple[int, str]] = field(default_factory=list)  # a heap

    def add(self, user: str, profile: Sequence[Entry]) -> None:
        if not profile:
            return
        heapq.heappush(self._sizes, (len(profile), user))
        self.profiles[user] = _items(profile[-self.latest :])
        if len(self._sizes) > _PROFILES:
            del self.profiles[heapq.heappop(self._sizes)[1]]


def stream_users(path: Path, task: Task, *, latest: int) -> Items:
    """What `read_users(path, task).to_train_on()` gives, without the rest of the file in memory.

    `latest`: items to keep of a profile, where queries are trained on. Raises InvalidData on whatever
    is malformed; its message may be less exact than `read_users`'.
    """
    queries: Entries = {}
    profiles: Entries = {}  # of everybody, until the first queries
    longest = _Longest(latest)
    dropped = only_profiles = unnamed = 0
    for found in each_user(path, task):
        dropped += found.dropped_empty
        (user,) = found.users
        if user.query and not found.held_out:
            profiles.clear()  # queries are trained on where there are any
            queries[user.user_id] = _items(user.query)
            longest.add(user.user_id, user.profile)
            unnamed += found.questions
        elif user.profile:
            only_profiles += not found.questions
            if not queries:
                profiles[user.user_id] = _items(user.profile)
    if queries:
        return Items(source_of(path), "query", queries, dropped, longest.profiles, only_profiles, unnamed)
    return Items(source_of(path), "profile", profiles, dropped)


def each_user(path: Path, task: Task) -> Iterator[Users]:
    """What `users_of` gives for each record of a file, in its order; one record is in memory at a time.

    Raises InvalidData on whatever is malformed, also a user or query id that comes twice.
    """
    labels = labels_beside(path)
    golds = {} if labels is None else read_golds(labels)
    aside = _leaves_profiles_aside(path, task)
    seen: set[str] = set()
    query_ids: set[str] = set()
    with error_context(str(path)):
        for record in _records(path):
            found = users_of(
                [{**record, "profile": []} if aside else record], task, golds=golds, source=path.name
            )
            (user,) = found.users
            names = [entry.id for entry in (*user.query, *found.empty_queries)]
            if user.user_id in seen or not query_ids.isdisjoint(names):
                raise InvalidData(f"user {user.user_id[:40]} or one of the queries is there twice")
            seen.add(user.user_id)
            query_ids.update(names)
            yield found


def _items(entries: Sequence[Entry]) -> list[dict[str, str]]:
    return [dict(entry.item) for entry in entries]


def _records(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file's list, one at a time."""
    try:
        with path.open("rb") as file:
            if file.read(len(codecs.BOM_UTF8)) != codecs.BOM_UTF8:
                file.seek(0)
            yield from ijson.items(file, "item", use_float=True)
    except (OSError, ijson.JSONError, UnicodeDecodeError) as error:
        raise InvalidData("not JSON in UTF-8") from error


def _leaves_profiles_aside(path: Path, task: Task) -> bool:
    """Whether no profile item has the task's fields, while queries do the same service (as `users_of`)."""
    some = query_ids = False
    with error_context(str(path)):
        for record in _records(path):
            if not isinstance(record, dict):
                raise InvalidData("it should be a list of users with user_id, profile and query")
            items = record.get("profile")
            for item in items if isinstance(items, list) else []:
                some = True
                if isinstance(item, dict) and set(task.fields_of(item)) <= item.keys():
                    return False
            query_ids |= bool(record.get("query")) or "input" in record
    return some and query_ids
