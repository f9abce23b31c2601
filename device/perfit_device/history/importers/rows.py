"""Rows of names and values as examples, whatever the file was that had them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from perfit_device.history.items import HistoryItem, problems_of
from perfit_shared.errors import InvalidData
from perfit_shared.json_input import error_context, is_date
from perfit_shared.tasks import Task

__all__ = ["canonical_names", "collect", "date_and_part"]

_OPTIONAL = ("date", "part")
_PARTS = ("", "test", "history")


def collect(rows: Iterable[tuple[str, Any]], task: Task) -> list[HistoryItem]:
    """Examples of (place, values) pairs; values may also be the InvalidData that reading them raised.

    Raises InvalidData with all that is wrong with the first bad row, and how many more are bad.
    """
    found: list[HistoryItem] = []
    wrong: list[InvalidData] = []
    for origin, values in rows:
        try:
            with error_context(origin):
                if isinstance(values, InvalidData):
                    raise values
                found.append(_item(values, task, origin))
        except InvalidData as error:
            wrong.append(error)
    if len(wrong) > 1:
        more = len(wrong) - 1
        raise InvalidData(f"{wrong[0]} ({more} more {'is' if more == 1 else 'are'} wrong)") from wrong[0]
    if wrong:
        raise wrong[0]
    return found


def canonical_names(names: Iterable[str], task: Task) -> list[str]:
    """Names as the task and we write them, whatever their case and the spaces around them."""
    known = {name.casefold(): name for name in (*task.field_names, *_OPTIONAL)}
    return [known.get(name.strip().casefold(), name.strip()) for name in names]


def date_and_part(values: Mapping[str, Any]) -> tuple[str, str, list[str]]:
    """(date, part, what is wrong with them)."""
    problems = []
    date, part = values.get("date") or "", values.get("part") or ""
    if not isinstance(date, str) or (date and not is_date(date)):
        problems.append('field "date" should be a date like 2024-05-31')
    if part not in _PARTS:
        problems.append('field "part" should be "test" or left out')
    return str(date), "test" if part == "test" else "", problems


def _item(values: Any, task: Task, origin: str) -> HistoryItem:
    if not isinstance(values, dict):
        raise InvalidData("it should be an object with the task's fields")
    # A name that is right as it stands wins over one that only looks like it.
    named = dict(zip(canonical_names(values, task), values.values(), strict=True)) | values
    wrong = problems_of(task, named)
    date, part, others = date_and_part(named)
    if wrong:
        wrong[-1] += f" (an example of {task.name} has {' and '.join(task.fields_of(named))})"
    if wrong or others:
        raise InvalidData("; ".join(wrong + others))
    return HistoryItem.make(task, named, date=date, part=part, origin=origin)
