"""JSON lines, and JSON lists of the same objects."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from perfit_device.history.importers.rows import collect
from perfit_device.history.importers.source import Source
from perfit_device.history.items import HistoryItem
from perfit_shared.errors import InvalidData
from perfit_shared.json_input import numbered_lines, parse_json
from perfit_shared.tasks import Task

__all__ = ["fits", "read"]


def fits(source: Source) -> bool:
    """Any text: `read` reports lines that are no JSON."""
    return True


def read(source: Source, task: Task) -> list[HistoryItem]:
    records = source.records
    if records is None:
        return collect(_rows(source.text), task)
    if not all(isinstance(record, dict) for record in records):
        raise InvalidData("it should be a list of objects")
    return collect(((f"item {number}", record) for number, record in enumerate(records)), task)


def _rows(text: str) -> Iterator[tuple[str, Any]]:
    for number, line in numbered_lines(text):
        try:
            values = parse_json(line)
        except InvalidData as error:
            values = error
        yield f"line {number}", values
