"""The three files of an OPPU folder, from people with histories and queries.

    user_others.json                    everyone outside the test cohort: stage 1
    user_top_100_history.json           the cohort, those with the longest histories: stage 2
    user_top_100_history_label.json     the gold answers of the cohort's queries, which are held out

Ids stay as the source has them, numbers and texts: LaMP's and OPPU's scripts compare them with their types.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from perfit_shared.errors import InvalidInput
from perfit_shared.files import written_whole
from perfit_shared.lamp import Entry
from perfit_shared.tasks import Task

__all__ = ["TASK_FILE", "Candidate", "Notify", "Prepared", "check_out", "write_folder"]

Notify = Callable[[str], None]

TASK_FILE = "task.json"
_OTHERS, _TOP, _LABELS = "user_others.json", "user_top_100_history.json", "user_top_100_history_label.json"


@dataclass(frozen=True)
class Prepared:
    """A folder that was written, in counts."""

    task: str
    folder: str
    users: int  # of the cohort
    history: int  # their profile items
    shortest_history: int
    queries: int  # theirs, held out
    others: int  # users
    others_history: int
    others_queries: int
    left_out: Mapping[str, int]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Candidate:
    """A person, before the cohort is chosen."""

    name: str | int  # `user_id` of LaMP's records; as text it orders people of equally long histories
    numbered: bool  # the files get a number instead of the name
    profile: Sequence[Entry]
    query: Sequence[Entry]
    history: Sequence[Entry]  # of the profile, what a member of the cohort learns from
    held_out: Sequence[Entry]  # of the queries, what a member of the cohort is tested on


def check_out(out: Path, *, force: bool, also: tuple[str, ...] = ()) -> None:
    if out.exists() and not out.is_dir():
        raise InvalidInput(f"{out} is a file; --out should be a folder")
    there = next((name for name in (_OTHERS, _TOP, _LABELS, *also) if (out / name).exists()), None)
    if there is not None and not force:
        raise InvalidInput(f"{out} holds {there} already; use another --out, or --force to replace it")


def write_folder(
    task: Task,
    out: Path,
    people: Iterable[Candidate],
    *,
    users: int,
    least: int,
    left_out: Mapping[str, int],
    notify: Notify,
    label_task: str = "",
    task_json: dict[str, Any] | None = None,
) -> Prepared:
    """Choose the cohort, number everybody, write the files. Raises InvalidInput when a side is empty.

    `label_task`: the name of the task in the source's own labels, which stays; else LaMP's for `task`.
    """
    ranked = sorted(people, key=lambda person: (-len(person.history), str(person.name)))
    able = [person for person in ranked if person.held_out and len(person.history) >= least]
    cohort = able[: max(users, 0)]
    chosen = {id(person) for person in cohort}
    others = [person for person in ranked if id(person) not in chosen]
    if not cohort or not any(person.query for person in others):
        raise InvalidInput(
            f"{task.name}: of {len(ranked)} people {len(able)} have queries and a history of {least} or "
            f"more; a cohort of {users} leaves nobody to test on or nobody to learn from"
        )
    if len(cohort) < users:
        notify(f"{task.name}: {len(cohort)} people, not {users}, have a history of {least} or more")
    numbers = {id(person): number for number, person in enumerate([*cohort, *others])}

    def record(person: Candidate, profile: Iterable[Entry], query: Iterable[Entry]) -> str:
        return _json(
            {
                "user_id": numbers[id(person)] if person.numbered else person.name,
                "profile": [_profile_row(entry) for entry in profile],
                "query": [_query_row(entry, task) for entry in query],
            }
        )

    golds = [{"id": q.raw_id, "output": q.item[task.gold_field]} for p in cohort for q in p.held_out]
    files = {
        _OTHERS: _array(record(p, p.profile, p.query) for p in others),
        _TOP: _array(record(p, p.history, p.held_out) for p in cohort),
        _LABELS: [_json({"task": label_task or task.lamp, "golds": golds}), "\n"],
    }
    if task_json is not None:
        files[TASK_FILE] = [_json(task_json), "\n"]
    _write_all(out, files)
    return Prepared(
        task=task.name,
        folder=str(out),
        users=len(cohort),
        history=sum(len(p.history) for p in cohort),
        shortest_history=min(len(p.history) for p in cohort),
        queries=len(golds),
        others=len(others),
        others_history=sum(len(p.profile) for p in others),
        others_queries=sum(len(p.query) for p in others),
        left_out=left_out,
    )


def _profile_row(entry: Entry) -> dict[str, Any]:
    return {"id": entry.raw_id, **({"date": entry.date} if entry.date else {}), **entry.item, **entry.extra}


def _query_row(entry: Entry, task: Task) -> dict[str, Any]:
    return {"id": entry.raw_id, "input": entry.extra["input"], "gold": entry.item[task.gold_field]}


def _json(value: dict[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False)


def _array(records: Iterable[str]) -> Iterable[str]:
    """A JSON list, a record a line, without holding it whole in memory."""
    separator = "[\n"
    for record in records:
        yield separator + record
        separator = ",\n"
    yield "\n]\n"


def _write_all(out: Path, files: Mapping[str, Iterable[str]]) -> None:
    """All files or none: all are written before the first replaces an old one."""
    out.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        for name, parts in files.items():
            file = stack.enter_context(written_whole(out / name))
            file.writelines(part.encode() for part in parts)
            file.flush()
