"""History files: JSON lines, CSV, and the users of LaMP as OPPU and PerFit store them.

    JSONL  {"text": "…", "title": "…", "date": "2024-05-01", "part": "test"}   a line an example
    CSV    the same names in the first row
    LaMP   [{"user_id", "profile": [{task fields}], "query": [{"id", "input", "gold"}]}]

Of a LaMP user the profile is history and the queries are the test part. Where profiles lack the
task's fields (LaMP-7 holds tweets without their paraphrases), the queries are the history.

`date` (ISO 8601) and `part` ("test": never trained on) may be left out. Every problem is
InvalidData that names the file, the item and the field.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from perfit_device.history import HistoryItem
from perfit_shared.errors import InvalidData
from perfit_shared.tasks import Task

__all__ = ["read_history"]

_T = TypeVar("_T")
_LARGEST = 256 * 1024 * 1024  # bytes of one file
_DATE = re.compile(r"^\d{4}(-\d\d(-\d\d([T ][0-9:.]+(Z|[+-]\d\d:?\d\d)?)?)?)?$")


def read_history(path: Path, task: Task, *, user: str | None = None) -> list[HistoryItem]:
    """All examples of a file for one task; of the user named `user` where it holds several.

    Raises InvalidData naming file, item and field; then nothing should be kept of the file.
    """
    text = _read(path)
    start = text.lstrip()[:512].lower()
    try:
        if start.startswith("<"):
            raise InvalidData("this is a web page, not data; check where it was downloaded from")
        if path.suffix.lower() in (".csv", ".tsv"):
            items = _from_csv(text, task, "\t" if path.suffix.lower() == ".tsv" else ",")
        elif start.startswith("["):
            items = _from_array(text, task, user)
        else:
            items = _from_lines(text, task)
        if user is not None and not start.startswith("["):
            raise InvalidData("this file holds one person; --user is for LaMP files")
    except InvalidData as error:
        raise InvalidData(f"{path}: {error}") from error
    if not items:
        raise InvalidData(f"{path}: there are no examples in it")
    return items


def _read(path: Path) -> str:
    try:
        if path.stat().st_size > _LARGEST:
            raise InvalidData(f"{path}: larger than {_LARGEST >> 20} MiB; split it")
        return path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InvalidData(f"{path}: not UTF-8 text; save it as UTF-8") from error
    except OSError as error:
        raise InvalidData(f"{path}: cannot be read ({error.strerror})") from error


def _from_lines(text: str, task: Task) -> list[HistoryItem]:
    items = []
    # Not splitlines(): it also splits at U+2028, which JSON allows inside strings.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            items.append(_item(f"line {number}", _json(line, f"line {number}"), task))
    return items


def _from_csv(text: str, task: Task, delimiter: str) -> list[HistoryItem]:
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    items = []
    try:
        for row in reader:
            place = f"row {reader.line_num}"
            if None in row or None in row.values():
                raise InvalidData(f"{place} has not as many columns as the first row")
            items.append(_item(place, row, task))
    except csv.Error as error:
        raise InvalidData(f"row {reader.line_num}: not CSV ({error})") from error
    return items


def _from_array(text: str, task: Task, user: str | None) -> list[HistoryItem]:
    records = _json(text, "the file")
    if not all(isinstance(record, dict) for record in records):
        raise InvalidData("it should be a list of objects")
    if not any("profile" in record or "query" in record for record in records):
        if user is not None:
            raise InvalidData("this file holds one person; --user is for LaMP files")
        return [_item(f"item {n}", record, task) for n, record in enumerate(records)]
    return list(_lamp_items(_lamp_user(records, user), task))


def _lamp_user(records: list[dict[str, Any]], user: str | None) -> dict[str, Any]:
    """The record of `user`: an id of the file, else an index from 0."""
    if user is None:
        if len(records) == 1:
            return records[0]
        raise InvalidData(f"it holds {len(records)} users; say which with --user ID")
    for record in records:
        if str(record.get("user_id")) == user:
            return record
    if user.isascii() and user.isdigit() and len(user) < 10 and int(user) < len(records):
        return records[int(user)]
    some = ", ".join(str(record.get("user_id")) for record in records[:8])
    raise InvalidData(f'it has no user "{user[:40]}"; there are {some}{" …" if len(records) > 8 else ""}')


def _lamp_items(record: Mapping[str, Any], task: Task) -> Iterator[HistoryItem]:
    """Profile items are history and queries the held-out test part, or queries alone the history."""
    who = f"user {str(record.get('user_id'))[:40]}"
    parts: dict[str, list[Any]] = {}
    for part in ("profile", "query"):
        entries = record.get(part, [])
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise InvalidData(f'{who}: field "{part}" should be a list of objects')
        parts[part] = entries
    # Queries are no stand-in for a profile with a broken item: that is named below.
    names = set(task.field_names)
    usable = any(names <= entry.keys() for entry in parts["profile"])
    instead = bool(parts["profile"] and parts["query"]) and not usable
    for number, entry in enumerate([] if instead else parts["profile"]):
        yield _item(f"{who}, profile item {_named(entry, number)}", entry, task)
    for number, entry in enumerate(parts["query"]):
        place = f"{who}, query {_named(entry, number)}"
        for field in ("input", "gold"):
            if not isinstance(entry.get(field), str) or not entry[field].strip():
                raise InvalidData(
                    f'{place}: field "{field}" is missing or empty'
                    + ("; golds in a file of their own should be merged in first" * (field == "gold"))
                )
        item = _at(place, partial(task.item_from_query, entry["input"], entry["gold"]))
        yield _item(place, {**item, "part": "" if instead else "test", "date": entry.get("date", "")}, task)


def _named(entry: Mapping[str, Any], number: int) -> str:
    return str(entry.get("id", number))[:40]


def _item(place: str, values: Any, task: Task) -> HistoryItem:
    if not isinstance(values, dict):
        raise InvalidData(f"{place}: should be an object with the task's fields")
    date, part = values.get("date") or "", values.get("part") or ""
    if not isinstance(date, str) or (date and not _DATE.match(date)):
        raise InvalidData(f'{place}: field "date" should be a date like 2024-05-31')
    if part not in ("", "test", "history"):
        raise InvalidData(f'{place}: field "part" should be "test" or left out')
    return _at(
        place,
        lambda: HistoryItem.make(task, values, date=date, part="test" if part == "test" else ""),
    )


def _at(place: str, make: Callable[[], _T]) -> _T:
    try:
        return make()
    except InvalidData as error:
        raise InvalidData(f"{place}: {error}") from error


def _json(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise InvalidData(
            f"{place}: not JSON ({error.msg}, line {error.lineno}, column {error.colno})"
        ) from error
    except (ValueError, RecursionError) as error:
        raise InvalidData(f"{place}: not JSON") from error
