"""LaMP's files and OPPU's, as users with items of a task: the one reader of device, stage 1 and LaMP runs.

    OPPU   user_others.json, user_top_100_history.json
           [{"user_id", "profile": [{"id", "date", the task's fields}], "query": [{"id", "input", "gold"}]}]
           (a query may have the template's fields in place of `input`)
           user_top_100_history_label.json   {"task", "golds": [{"id", "output"}]}
    LaMP   questions.json                    [{"id", "input", "profile"}], every question somebody of its own
           outputs.json                      {"task", "golds": [{"id", "output"}]}

Whatever is malformed is InvalidData that names file, user, item and field. An entry with an empty
field is left out and counted.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from perfit_shared.errors import InvalidData
from perfit_shared.json_input import (
    date_of,
    error_context,
    id_of,
    is_date,
    is_list_of_objects,
    list_of,
    parse_json,
    read_text,
    shown_id,
    text_of,
)
from perfit_shared.tasks import Task

__all__ = [
    "Entry",
    "Labels",
    "User",
    "Users",
    "item_of",
    "labels_beside",
    "read_golds",
    "read_labels",
    "read_users",
    "users_of",
]


@dataclass(frozen=True)
class Entry:
    """One profile item or query. `item`: the task's fields as text, numbers such as scores included."""

    id: str  # the file's, as text; of a profile item without one, its index from 0
    date: str  # as the file has it; "" if it has none, as queries
    item: Mapping[str, str]
    extra: Mapping[str, str] = field(default_factory=dict)  # a query's `input`; other texts, as 2N's title
    # As the file has it, for files made of it: LaMP's and OPPU's scripts compare ids with their types.
    raw_id: str | int = ""

    def __post_init__(self) -> None:
        if self.raw_id == "":
            object.__setattr__(self, "raw_id", self.id)


@dataclass(frozen=True)
class User:
    """`profile` oldest first where every entry has an ISO date, else as the file has it."""

    user_id: str
    profile: tuple[Entry, ...]
    query: tuple[Entry, ...]
    person: str | int | None = None  # `user_id` of a LaMP question's record as the file has it

    @property
    def dated(self) -> bool:
        """Whether dates order the profile: every entry has one in ISO 8601."""
        return all(is_date(entry.date) for entry in self.profile)


@dataclass(frozen=True)
class Labels:
    """A label file: the gold answers of queries, by their ids as text."""

    task: str = ""  # LaMP's name for it, as the file has it: "LaMP_2"
    golds: Mapping[str, str] = field(default_factory=dict)
    raw_ids: Mapping[str, str | int] = field(default_factory=dict)  # as the file has them


@dataclass(frozen=True)
class Users:
    """What a file holds, and what was left out of it."""

    source: str  # file name and its folder's, no path
    users: tuple[User, ...]
    questions: bool  # LaMP's own form, every question a user of its own
    held_out: bool  # the golds of the queries have a label file: these users are tested on them
    no_profiles: bool  # no profile item had the task's fields, so all were left aside
    dropped_empty: int  # profile items and queries with an empty field
    empty_queries: tuple[Entry, ...]  # the queries among them, for who must answer every one
    labels: Labels = field(default_factory=Labels)  # of the label file, where there is one

    def to_train_on(self) -> tuple[str, dict[str, tuple[Entry, ...]]]:
        """What stage 1 learns from: ("query" or "profile", entries by user id), nobody without any.

        The queries, as in OPPU's training for a task: profiles may repeat them, and where they do not
        they are up to two hundred times as much. The profiles where the queries are held out, or
        nobody has any.
        """
        queries = not self.held_out and any(user.query for user in self.users)
        entries = {user.user_id: user.query if queries else user.profile for user in self.users}
        return "query" if queries else "profile", {name: found for name, found in entries.items() if found}


# -- files -------------------------------------------------------------------------------------------


def read_users(path: Path, task: Task, *, golds: Path | None = None) -> Users:
    """Read an OPPU file or LaMP's questions.

    `golds` is a label file for queries that lack their gold; without it, the one that lies beside
    (`labels_beside`). Raises InvalidData naming file, item and field, also where a query's gold and
    its label differ.
    """
    file = golds or labels_beside(path)
    labels = Labels() if file is None else read_labels(file)
    source = f"{path.resolve().parent.name}/{path.name}"
    with error_context(str(path)):
        found = users_of(parse_json(read_text(path)), task, golds=labels.golds, source=source)
    return replace(found, labels=labels)


def read_golds(path: Path) -> Mapping[str, str]:
    """Gold answers by query id, of LaMP's outputs.json or OPPU's label file. Raises InvalidData."""
    return read_labels(path).golds


def read_labels(path: Path) -> Labels:
    """LaMP's outputs.json or OPPU's label file. Raises InvalidData."""
    with error_context(str(path)):
        data = parse_json(read_text(path))
        entries = data.get("golds") if isinstance(data, dict) else None
        if not is_list_of_objects(entries):
            raise InvalidData('it should be {"task": …, "golds": [{"id": …, "output": …}]}')
        golds: dict[str, str] = {}
        raw_ids: dict[str, str | int] = {}
        for number, entry in enumerate(entries):
            with error_context(f"gold {shown_id(entry, number)}"):
                name = id_of(entry)
                if name in golds:
                    raise InvalidData("it is there twice")
                golds[name], raw_ids[name] = text_of(entry, "output"), entry["id"]
        return Labels(text_of(data, "task") if "task" in data else "", golds, raw_ids)


def labels_beside(path: Path) -> Path | None:
    """The label file that belongs to `path`: `X_label.json` of `X.json`, `outputs.json` of questions.json."""
    for name in (f"{path.stem}_label.json", path.name.replace("questions", "outputs")):
        if name != path.name and (path.parent / name).is_file():
            return path.parent / name
    return None


# -- users -------------------------------------------------------------------------------------------


def users_of(records: Any, task: Task, *, golds: Mapping[str, str], source: str) -> Users:
    """The users of a parsed file. `golds`: gold answers by query id, for queries without their own.

    Raises InvalidData naming user, item and field.
    """
    if not is_list_of_objects(records):
        raise InvalidData("it should be a list of users with user_id, profile and query, or of questions")
    questions = bool(records) and "input" in records[0] and "query" not in records[0]
    raw = [_record(record, number, questions=questions) for number, record in enumerate(records)]
    aside = _profiles_are_useless(raw, task)
    reader = _Reader(task, golds)
    users: dict[str, User] = {}
    for record in raw:
        with error_context(record.origin):
            if record.user_id in users:
                raise InvalidData("it is there twice")
            users[record.user_id] = reader.user(record, aside=aside)
    return Users(
        source=source,
        users=tuple(users.values()),
        questions=questions,
        held_out=bool(golds) and not questions,
        no_profiles=aside,
        dropped_empty=reader.dropped_empty,
        empty_queries=tuple(reader.empty_queries),
    )


@dataclass(frozen=True)
class _Record:
    """A user before its entries are looked at."""

    user_id: str
    origin: str  # for messages
    profile: list[dict[str, Any]]
    query: list[dict[str, Any]]
    person: str | int | None


def _record(record: Mapping[str, Any], number: int, *, questions: bool) -> _Record:
    key = "id" if questions else "user_id"
    origin = f"{'question' if questions else 'user'} {shown_id(record, number, key)}"
    with error_context(origin):
        name = id_of(record, key)
        named = questions and "user_id" in record and id_of(record, "user_id")
        if not questions and not {"profile", "query"} & record.keys():
            raise InvalidData('field "profile" is missing')
        return _Record(
            name,
            origin,
            list_of(record, "profile"),
            [dict(record)] if questions else list_of(record, "query"),
            record["user_id"] if named else None,
        )


def _profiles_are_useless(records: Collection[_Record], task: Task) -> bool:
    """Whether no profile item of a file has the task's fields, while its queries do the same service.

    Queries are no stand-in where some profile is sound: there a broken item is named.
    """
    items = [item for record in records for item in record.profile]
    usable = any(set(task.fields_of(item)) <= item.keys() for item in items)
    return bool(items) and not usable and any(record.query for record in records)


class _Reader:
    """Turns raw entries into `Entry`s, and counts."""

    def __init__(self, task: Task, golds: Mapping[str, str]) -> None:
        self._task, self._golds = task, golds
        self._queries: set[str] = set()
        self.dropped_empty = 0
        self.empty_queries: list[Entry] = []

    def user(self, record: _Record, *, aside: bool) -> User:
        profile = [self._profile(raw, n) for n, raw in enumerate([] if aside else record.profile)]
        query = [self._query(raw, n) for n, raw in enumerate(record.query)]
        user = User(record.user_id, tuple(filter(None, profile)), tuple(filter(None, query)), record.person)
        ordered = sorted(user.profile, key=lambda entry: entry.date) if user.dated else user.profile
        return replace(user, profile=tuple(ordered))

    def _profile(self, raw: Mapping[str, Any], number: int) -> Entry | None:
        with error_context(f"profile item {shown_id(raw, number)}"):
            item = item_of(raw, self._task)
            name, raw_id = (id_of(raw), raw["id"]) if "id" in raw else (str(number), "")
            date = date_of(raw)
        if item is None:
            self.dropped_empty += 1
            return None
        used = {"id", "date", *item}
        extra = {key: value for key, value in raw.items() if key not in used and isinstance(value, str)}
        return Entry(name, date, item, extra, raw_id)

    def _query(self, raw: Mapping[str, Any], number: int) -> Entry | None:
        with error_context(f"query {shown_id(raw, number)}"):
            name = id_of(raw)
            if name in self._queries:
                raise InvalidData("another query of the file has this id")
            self._queries.add(name)
            item, extra = self._asked(raw, name)
        entry = Entry(name, date_of(raw), item, extra, raw["id"])
        if not all(value.strip() for value in item.values()):
            self.dropped_empty += 1
            self.empty_queries.append(entry)
            return None
        return entry

    def _asked(self, raw: Mapping[str, Any], name: str) -> tuple[dict[str, str], dict[str, str]]:
        """(item, extra) of a query: its `input`, or the fields themselves, as a task of several needs."""
        names = self._task.template_fields
        if len(names) == 1 and ("input" in raw or names[0] not in raw):
            text = text_of(raw, "input")
            return self._task.item_from_query(text, self._gold(raw, name)), {"input": text}
        item = {field: text_of(raw, field) for field in names}
        return {**item, self._task.gold_field: self._gold(raw, name)}, {}

    def _gold(self, raw: Mapping[str, Any], name: str) -> str:
        key = "gold" if "gold" in raw else "output"  # what LaMP's own merging of its two files makes
        own, label = text_of(raw, key) if key in raw else None, self._golds.get(name)
        if own and label and own != label:
            raise InvalidData(f'field "{key}" is not what the label file has')
        if own is None and label is None:
            raise InvalidData('field "gold" is missing, and no label file has it')
        return own or label or ""


# -- values ------------------------------------------------------------------------------------------


def item_of(values: Mapping[str, Any], task: Task) -> dict[str, str] | None:
    """The fields that `task` wants of such an item, as stripped text; None when one is empty.

    Raises InvalidData naming the field that is missing or neither text nor a number.
    """
    names = task.fields_of(values)
    item = {name: text_of(values, name) for name in names}
    return item if all(item.values()) else None
