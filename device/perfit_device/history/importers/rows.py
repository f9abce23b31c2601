"""Rows of names and values, and pairs of texts, as examples, whatever the source was that had them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from perfit_device.history.importers.choices import Choices
from perfit_device.history.items import HistoryItem, problems_of
from perfit_shared.errors import InvalidData
from perfit_shared.json_input import error_context, is_date
from perfit_shared.tasks import Task

__all__ = ["canonical_names", "check_pairs", "collect", "date_and_part", "of_pair"]

_OPTIONAL = ("date", "part")
_PARTS = ("", "test", "history")


def collect(rows: Iterable[tuple[str, Any]], task: Task) -> Iterator[HistoryItem]:
    """Examples of (place, values) pairs; values may also be the InvalidData that reading them raised.

    Raises InvalidData with all that is wrong with the first bad row, and how many more are bad.
    """
    first: InvalidData | None = None
    more = 0
    for origin, values in rows:
        try:
            with error_context(origin):
                if isinstance(values, InvalidData):
                    raise values
                item = _item(values, task, origin)
        except InvalidData as error:
            more += first is not None
            first = first or error
        else:
            if first is None:
                yield item
    if first is not None and more:
        raise InvalidData(f"{first} ({more} more {'is' if more == 1 else 'are'} wrong)") from first
    if first is not None:
        raise first


def canonical_names(names: Iterable[str], task: Task, choices: Choices | None = None) -> list[str]:
    """Names as the task and we write them, whatever their case and the spaces around them.

    A column that the person chose for a field stands for it, and one of the field's own name for nothing.
    """
    known = {name.casefold(): name for name in (*task.field_names, *_OPTIONAL)}
    for column, name in _chosen(task, choices or Choices()):
        known[name.casefold()] = ""
        known[column] = name
    return [known.get(name.strip().casefold(), name.strip()) for name in names]


def _chosen(task: Task, choices: Choices) -> Iterator[tuple[str, str]]:
    for column, name in ((choices.text_column, task.text_field), (choices.answer_column, task.gold_field)):
        if column is not None:
            yield column.strip().casefold(), name


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


def check_pairs(task: Task, kind: str) -> None:
    """Raises InvalidData where an example of `task` needs more than a text and its answer."""
    if more := [name for name in task.field_names if name not in (task.text_field, task.gold_field)]:
        raise InvalidData(
            f"an example of {task.name} also has {', '.join(more)}, which {kind} does not say; "
            "choose another task with --task"
        )


def of_pair(
    task: Task, text: str, answer: str, *, date: str = "", part: str = "", origin: str = ""
) -> HistoryItem:
    """What was there, and what the person wrote about it. Raises InvalidData."""
    values = {task.text_field: text, task.gold_field: answer}
    return HistoryItem.make(task, values, date=date, part=part, origin=origin)
