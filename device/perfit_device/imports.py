"""History files: JSON lines, CSV, and the users of LaMP as OPPU and PerFit store them.

    JSONL  {"text": "…", "title": "…", "date": "2024-05-01", "part": "test"}   a line an example
    CSV    the same names in the first row
    LaMP   [{"user_id", "profile": [{task fields}], "query": [{"id", "input", "gold"}]}]

Of a LaMP user the profile is history and the queries are the test part. Where no profile of the file
has the task's fields, the queries are the history.

`date` (ISO 8601) and `part` ("test": never trained on) may be left out. Every problem is
InvalidData that names the file, the item and the field; only entries of LaMP files that have an
empty field are passed over.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from perfit_device.history import HistoryItem
from perfit_shared.errors import InvalidData
from perfit_shared.lamp import (
    Entry,
    User,
    at,
    is_date,
    labels_beside,
    parse_json,
    read_golds,
    read_text,
    users_of,
)
from perfit_shared.tasks import Task

__all__ = ["read_history"]

_LARGEST = 256 * 1024 * 1024  # bytes of one file


def read_history(
    path: Path, task: Task, *, user: str | None = None, tell: Callable[[str], None] = lambda _: None
) -> list[HistoryItem]:
    """All examples of a file for one task; of the user named `user` where it holds several.

    `tell` is given a line when something was left out. Raises InvalidData naming file, item and
    field; then nothing should be kept of the file.
    """
    _check_size(path)
    with at(str(path)):
        text = read_text(path)
        array = text.lstrip()[:1] == "["
        if user is not None and not array:
            raise InvalidData("this file holds one person; --user is for LaMP files")
        if path.suffix.lower() in (".csv", ".tsv"):
            items = _from_csv(text, task, "\t" if path.suffix.lower() == ".tsv" else ",")
        elif array:
            items = _from_array(path, parse_json(text), task, user=user, tell=tell)
        else:
            items = _from_lines(text, task)
        if not items:
            raise InvalidData("there are no examples in it")
        return items


def _check_size(path: Path) -> None:
    try:
        size = path.stat().st_size
    except OSError as error:
        raise InvalidData(f"{path}: cannot be read ({error.strerror})") from error
    if size > _LARGEST:
        raise InvalidData(f"{path}: larger than {_LARGEST >> 20} MiB; split it")


def _from_lines(text: str, task: Task) -> list[HistoryItem]:
    items = []
    # Not splitlines(): it also splits at U+2028, which JSON allows inside strings.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            with at(f"line {number}"):
                items.append(_item(parse_json(line), task))
    return items


def _from_csv(text: str, task: Task, delimiter: str) -> list[HistoryItem]:
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    items = []
    try:
        for row in reader:
            with at(f"row {reader.line_num}"):
                if None in row or None in row.values():
                    raise InvalidData("it has not as many columns as the first row")
                items.append(_item(row, task))
    except csv.Error as error:
        raise InvalidData(f"row {reader.line_num}: not CSV ({error})") from error
    return items


def _from_array(
    path: Path, records: Any, task: Task, *, user: str | None, tell: Callable[[str], None]
) -> list[HistoryItem]:
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise InvalidData("it should be a list of objects")
    if not any("profile" in record or "query" in record for record in records):
        if user is not None:
            raise InvalidData("this file holds one person; --user is for LaMP files")
        items = []
        for number, record in enumerate(records):
            with at(f"item {number}"):
                items.append(_item(record, task))
        return items
    labels = labels_beside(path)
    found = users_of(records, task, golds={} if labels is None else read_golds(labels), source=path.name)
    if found.dropped_empty:
        tell(f"{found.dropped_empty} entries of the file have an empty field and were left out")
    return _of_user(_chosen(found.users, user), task, queries_are_history=found.no_profiles)


def _chosen(users: tuple[User, ...], wanted: str | None) -> User:
    """The one with the id `wanted`, else at the index from 0."""
    if wanted is None:
        if len(users) == 1:
            return users[0]
        raise InvalidData(f"it holds {len(users)} users; say which with --user ID")
    for user in users:
        if user.user_id == wanted:
            return user
    if wanted.isascii() and wanted.isdigit() and len(wanted) < 10 and int(wanted) < len(users):
        return users[int(wanted)]
    some = ", ".join(user.user_id for user in users[:8])
    raise InvalidData(f'it has no user "{wanted[:40]}"; there are {some}{" …" if len(users) > 8 else ""}')


def _of_user(user: User, task: Task, *, queries_are_history: bool) -> list[HistoryItem]:
    def item(entry: Entry, *, dated: bool, part: str = "") -> HistoryItem:
        return HistoryItem(task.name, entry.item, date=entry.date if dated else "", part=part)

    part = "" if queries_are_history else "test"
    # Dates that cannot order a profile are dropped: the order of adding stands for them.
    history = [item(entry, dated=user.dated) for entry in user.profile]
    return history + [item(entry, dated=is_date(entry.date), part=part) for entry in user.query]


def _item(values: Any, task: Task) -> HistoryItem:
    if not isinstance(values, dict):
        raise InvalidData("it should be an object with the task's fields")
    date, part = values.get("date") or "", values.get("part") or ""
    if not isinstance(date, str) or (date and not is_date(date)):
        raise InvalidData('field "date" should be a date like 2024-05-31')
    if part not in ("", "test", "history"):
        raise InvalidData('field "part" should be "test" or left out')
    _check_text(values, task)
    return HistoryItem.make(task, values, date=date, part="test" if part == "test" else "")


def _check_text(values: Mapping[str, Any], task: Task) -> None:
    """JSON also makes lone surrogates, which no file can hold."""
    for name in task.field_names:
        value = values.get(name)
        if isinstance(value, str):
            try:
                value.encode()
            except UnicodeEncodeError as error:
                raise InvalidData(f'field "{name}" is no text that UTF-8 can carry') from error
