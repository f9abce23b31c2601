"""What `perfit history list --json` prints, of one task or several: it comes back as it was."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from perfit_device.history.importers.rows import Found, date_and_part
from perfit_device.history.items import HistoryItem, problems_of
from perfit_shared.errors import InvalidData
from perfit_shared.lamp import at
from perfit_shared.tasks import TASK_NAME, TASKS, Task

__all__ = ["fits", "read"]

_FIELDS = 17  # a template's most, and the answer's


def fits(records: Any) -> bool:
    """Whether every record says its task, and holds its fields by themselves."""
    return (
        isinstance(records, list)
        and bool(records)
        and all(
            isinstance(record, dict) and isinstance(record.get("fields"), dict) and "task" in record
            for record in records
        )
    )


def read(
    records: list[dict[str, Any]], task: Task | None, known: Mapping[str, Task], tell: Callable[[str], None]
) -> list[Found]:
    """All of them, or those of one task. Raises InvalidData.

    An example must have its task's fields, where there is a task of that name: `task`, one of `known`,
    or one of perfit's own. Of others nobody can say what fields they have.
    """
    tasks = {**TASKS, **known, **({task.name: task} if task else {})}
    found = []
    for number, record in enumerate(records):
        place = f"item {number}"
        with at(place):
            found.append(Found(place, _item(record, tasks)))
    wanted = [one for one in found if task is None or one.item.task == task.name]
    if len(wanted) < len(found):
        tell(f"{len(found) - len(wanted)} examples of the file are of other tasks and were left out")
    return wanted


def _item(record: Mapping[str, Any], tasks: Mapping[str, Task]) -> HistoryItem:
    task, fields = record["task"], record["fields"]
    if not isinstance(task, str) or not TASK_NAME.fullmatch(task):
        raise InvalidData('field "task" should be the name of a task')
    if not 1 <= len(fields) <= _FIELDS or not all(_is_text(k) and _is_text(v) for k, v in fields.items()):
        raise InvalidData('field "fields" should hold names and texts, none empty')
    date, part, problems = date_and_part(record)
    if task in tasks:
        problems = problems_of(tasks[task], fields) + problems
    if problems:
        raise InvalidData("; ".join(problems))
    return HistoryItem(task, dict(fields), date=date, part=part)


def _is_text(value: object) -> bool:
    if not isinstance(value, str) or not value.strip():
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
