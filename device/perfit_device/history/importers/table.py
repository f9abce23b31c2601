"""CSV and its kin, as spreadsheets write them: four delimiters, a `sep=` line, empty rows at the end."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator
from typing import Any

from perfit_device.history.importers.rows import canonical_names, collect
from perfit_device.history.importers.source import TABLES, Source
from perfit_device.history.importers.text import LARGEST
from perfit_device.history.items import HistoryItem
from perfit_shared.errors import InvalidData
from perfit_shared.tasks import Task

__all__ = ["fits", "read"]

_LINES = (".json", ".jsonl", ".ndjson")  # names of what is no table
_DELIMITERS = ",;\t|"
_HEAD = 1 << 16  # characters in which the first row is looked for
_SEPARATOR = re.compile(r"[\"']?sep=([,;\t|])[\"']?\r?\n", re.IGNORECASE)  # Excel's own first line


def fits(source: Source) -> bool:
    """By its name, or because it begins as no JSON does."""
    suffix = source.path.suffix.lower()
    looks_like_one = suffix not in _LINES and source.text.lstrip()[:1] != "{"
    return source.records is None and (suffix in TABLES or looks_like_one)


def read(source: Source, task: Task) -> list[HistoryItem]:
    text = source.text
    match = _SEPARATOR.match(text)
    skipped = 1 if match else 0
    if match:
        text = text[match.end() :]
    reader = _reader(text, match[1] if match else _delimiter(text, task))
    try:
        return collect(_rows(reader, task, skipped), task)
    except csv.Error as error:
        raise InvalidData(f"row {reader.line_num + skipped}: not CSV ({error})") from error


def _reader(text: str, delimiter: str, *, strict: bool = True) -> Any:
    csv.field_size_limit(LARGEST)  # its own limit is shorter than a long article
    return csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=strict)


def _delimiter(text: str, task: Task) -> str:
    """The one by which the first row holds most of the task's fields, then most columns."""

    def score(delimiter: str) -> tuple[int, int]:
        try:
            header: list[str] = _first_row(_reader(text[:_HEAD], delimiter, strict=False))
        except csv.Error:
            return 0, 0
        return len(set(canonical_names(header, task)) & set(task.field_names)), len(header)

    return max(_DELIMITERS, key=score)


def _first_row(reader: Any) -> list[str]:
    """The first one that holds anything."""
    return next((row for row in reader if any(map(str.strip, row))), [])


def _rows(reader: Any, task: Task, skipped: int) -> Iterator[tuple[str, Any]]:
    header = _header(_first_row(reader), task)
    for row in reader:
        origin = f"row {reader.line_num + skipped}"
        cells, rest = row[: len(header)], row[len(header) :]
        if not any(map(str.strip, row)):
            continue
        if len(cells) < len(header) or any(map(str.strip, rest)):
            yield origin, InvalidData("it has not as many columns as the first row")
        else:
            yield origin, dict(zip(header, cells, strict=True))


def _header(row: list[str], task: Task) -> list[str]:
    """The names of the columns, without empty ones at the end. Raises InvalidData."""
    names = canonical_names(row, task)
    while names and not names[-1]:
        names.pop()
    missing = [name for name in task.fields_of(names) if name not in names]
    if names and missing:
        raise InvalidData(
            f"the first row has no column {' and no column '.join(missing)}; "
            f"it has {', '.join(name[:40] for name in names[:12])}"
        )
    twice = {name for name in names if name and names.count(name) > 1}
    if twice:
        raise InvalidData(f"the first row has the column {min(twice)[:40]} twice")
    return names
