"""What `perfit history export` writes and `perfit history list --json` prints: it comes back as it was."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from perfit_device.history.importers.jsonl import rows
from perfit_device.history.importers.rows import date_and_part
from perfit_device.history.importers.source import Format, Source
from perfit_device.history.items import HistoryItem, problems_of
from perfit_shared.errors import InvalidData
from perfit_shared.json_input import error_context, is_text, parse_json
from perfit_shared.tasks import TASK_NAME, TASKS, Task

__all__ = ["FORMAT"]

_FIELDS = 17  # a template's most, and the answer's


def fits(source: Source) -> bool:
    """Whether every record of a list, or the first line, says its task and holds its fields apart."""
    records = source.records
    if records is None:
        first = source.text.lstrip().partition("\n")[0]
        try:
            records = [parse_json(first)] if first.startswith("{") else []
        except InvalidData:
            records = []
    return isinstance(records, list) and bool(records) and all(map(_is_ours, records))


def _is_ours(record: object) -> bool:
    return isinstance(record, dict) and isinstance(record.get("fields"), dict) and "task" in record


def read(source: Source, task: Task | None = None) -> Iterator[HistoryItem]:
    """All of them, or those of one task. Raises InvalidData.

    An example must have its task's fields, where there is a task of that name: `task`, one that the source
    knows, or one of perfit's own. Of others nobody can say what fields they have.
    """
    tasks = {**TASKS, **source.tasks, **({task.name: task} if task else {})}
    for origin, record in rows(source):
        with error_context(origin):
            if isinstance(record, InvalidData):
                raise record
            if not _is_ours(record):
                raise InvalidData('it should have "task" and "fields", as the first one has')
            item = _item(record, tasks, origin)
        if task is None or item.task == task.name:
            yield item
        else:
            source.report.skip("of another task", origin)


def _item(record: Mapping[str, Any], tasks: Mapping[str, Task], origin: str) -> HistoryItem:
    task, fields = record["task"], record["fields"]
    if not isinstance(task, str) or not TASK_NAME.fullmatch(task):
        raise InvalidData('field "task" should be the name of a task')
    if not 1 <= len(fields) <= _FIELDS or not all(map(_is_nonempty_text, [*fields, *fields.values()])):
        raise InvalidData('field "fields" should hold names and texts, none empty')
    date, part, problems = date_and_part(record)
    if task in tasks:
        problems = problems_of(tasks[task], fields) + problems
    if problems:
        raise InvalidData("; ".join(problems))
    return HistoryItem(task, dict(fields), date=date, part=part, origin=origin)


def _is_nonempty_text(value: object) -> bool:
    return is_text(value) and bool(value.strip())


FORMAT = Format("perfit", "what perfit exports", fits, read)
