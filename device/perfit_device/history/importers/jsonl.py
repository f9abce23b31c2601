"""JSON lines, and JSON lists of the same objects."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from perfit_device.history.importers.rows import collect
from perfit_device.history.importers.source import Format, Source
from perfit_device.history.items import HistoryItem
from perfit_shared.errors import InvalidData
from perfit_shared.json_input import numbered_lines, parse_json
from perfit_shared.tasks import Task

__all__ = ["FORMAT", "rows"]


def fits(source: Source) -> bool:
    """Any text: `read` reports lines that are no JSON."""
    return True


def read(source: Source, task: Task) -> Iterator[HistoryItem]:
    return collect(rows(source), task)


def rows(source: Source) -> Iterator[tuple[str, Any]]:
    """(place, object, or the InvalidData of reading it)."""
    records = source.records
    if records is None:
        yield from _lines(source.text)
        return
    if not all(isinstance(record, dict) for record in records):
        raise InvalidData("it should be a list of objects")
    for number, record in enumerate(records):
        yield f"item {number}", record


def _lines(text: str) -> Iterator[tuple[str, Any]]:
    for number, line in numbered_lines(text):
        try:
            values = parse_json(line)
        except InvalidData as error:
            values = error
        yield f"line {number}", values


FORMAT = Format("jsonl", "JSON", fits, read)
