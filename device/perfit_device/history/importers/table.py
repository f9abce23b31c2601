"""CSV and its kin, as spreadsheets write them: four delimiters, a `sep=` line, empty rows at the end."""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from perfit_device.history.importers.choices import Choices
from perfit_device.history.importers.rows import canonical_names, collect
from perfit_device.history.importers.source import TABLES, Format, Source
from perfit_device.history.importers.text import LARGEST
from perfit_device.history.items import HistoryItem
from perfit_shared.errors import InvalidData
from perfit_shared.tasks import Task

__all__ = ["COLUMNS", "FORMAT", "table_rows"]

_LINES = (".json", ".jsonl", ".ndjson")  # names of what is no table
_DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
_HEAD = 1 << 16  # characters in which the first row is looked for
COLUMNS = 1000  # the most
_SEPARATOR = re.compile(r"[\"']?sep=([,;\t|])[\"']?\r?\n", re.IGNORECASE)  # Excel's own first line


def fits(source: Source) -> bool:
    """By its name, or because it begins as no JSON does."""
    suffix = source.path.suffix.lower()
    looks_like_one = suffix not in _LINES and source.text.lstrip()[:1] != "{"
    return source.records is None and (suffix in TABLES or looks_like_one)


def read(source: Source, task: Task) -> Iterator[HistoryItem]:
    text, choices = source.text, source.choices
    match = _SEPARATOR.match(text)
    skipped = 1 if match else 0
    if match:
        text = text[match.end() :]
    delimiter = match[1] if match else _delimiter(text, task, choices)
    source.report.format = f"a table with {_DELIMITERS[delimiter]}"
    reader = _reader(text, delimiter)
    numbered = ((f"row {reader.line_num + skipped}", row) for row in reader)
    try:
        yield from collect(table_rows(numbered, task, choices), task)
    except csv.Error as error:
        raise InvalidData(f"row {reader.line_num + skipped}: not CSV ({error})") from error


def _reader(text: str, delimiter: str, *, strict: bool = True) -> Any:
    csv.field_size_limit(LARGEST)  # its own limit is shorter than a long article
    return csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=strict)


def _delimiter(text: str, task: Task, choices: Choices) -> str:
    """The one by which the first row holds most of the task's fields, then most columns."""

    def score(delimiter: str) -> tuple[int, int]:
        try:
            rows = _reader(text[:_HEAD], delimiter, strict=False)
            header: list[str] = next(filter(_has_text, rows), [])
        except csv.Error:
            return 0, 0
        return len(set(canonical_names(header, task, choices)) & set(task.field_names)), len(header)

    return max(_DELIMITERS, key=score)


def _has_text(row: Sequence[str]) -> bool:
    return any(map(str.strip, row))


def table_rows(
    rows: Iterable[tuple[str, Sequence[str]]], task: Task, choices: Choices
) -> Iterator[tuple[str, Any]]:
    """(place, values by name) of (place, cells), the first of which that are not empty are names."""
    header: list[str] = []
    for origin, row in rows:
        if not _has_text(row):
            continue
        if not header:
            header = _header(row, task, choices)
            continue
        cells, rest = row[: len(header)], row[len(header) :]
        if len(cells) < len(header) or _has_text(rest):
            yield origin, InvalidData("it has not as many columns as the first row")
        else:
            yield origin, {name: cell for name, cell in zip(header, cells, strict=True) if name}


def _header(row: Sequence[str], task: Task, choices: Choices) -> list[str]:
    """The names of the columns, without empty ones at the end. Raises InvalidData."""
    if len(row) > COLUMNS:
        raise InvalidData(f"the first row has {len(row)} columns; there may be {COLUMNS}")
    names = canonical_names(row, task, choices)
    while names and not names[-1] and not row[len(names) - 1].strip():
        names.pop()
    there = {name.strip().casefold() for name in row}
    chosen = [name for name in (choices.text_column, choices.answer_column) if name is not None]
    missing = [name for name in chosen if name.strip().casefold() not in there]
    missing = missing or [name for name in task.fields_of(names) if name not in names]
    if names and missing:
        raise InvalidData(
            f"the first row has no column {' and no column '.join(missing)}; "
            f"it has {', '.join(name[:40] for name in map(str.strip, row[:12]) if name)}"
        )
    twice = [name for name, count in Counter(names).items() if name and count > 1]
    if twice:
        raise InvalidData(f"the first row has the column {min(twice)[:40]} twice")
    return names


FORMAT = Format("csv", "a table", fits, read, reads=("text_column", "answer_column"))
