"""What `perfit history list --json` prints, of one task or several: it comes back as it was."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from perfit_device.history.importers.rows import date_and_part
from perfit_device.history.importers.source import Source
from perfit_device.history.items import HistoryItem, problems_of
from perfit_shared.errors import InvalidData
from perfit_shared.json_input import error_context, is_text
from perfit_shared.tasks import TASK_NAME, TASKS, Task

__all__ = ["fits", "read"]

_FIELDS = 17  # a template's most, and the answer's


def fits(source: Source) -> bool:
    """Whether every record says its task, and holds its fields by themselves."""
    records = source.records
    return (
        isinstance(records, list)
        and bool(records)
        and all(
            isinstance(record, dict) and isinstance(record.get("fields"), dict) and "task" in record
            for record in records
        )
    )


def read(source: Source, task: Task | None) -> list[HistoryItem]:
    """All of them, or those of one task. Raises InvalidData.

    An example must have its task's fields, where there is a task of that name: `task`, one that the source
    knows, or one of perfit's own. Of others nobody can say what fields they have.
    """
    tasks = {**TASKS, **source.tasks, **({task.name: task} if task else {})}
    found = []
    for number, record in enumerate(source.records):
        origin = f"item {number}"
        with error_context(origin):
            found.append(_item(record, tasks, origin))
    chosen = [item for item in found if task is None or item.task == task.name]
    if len(chosen) < len(found):
        source.notify(f"{len(found) - len(chosen)} examples of the file are of other tasks and were left out")
    return chosen


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
