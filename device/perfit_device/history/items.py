"""One example, and the examples of a vault: one sealed row each."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from perfit_shared.errors import InvalidData, InvalidInput, NotFound, VaultDamaged
from perfit_shared.json_input import as_text, is_text
from perfit_shared.tasks import Task

if TYPE_CHECKING:
    from perfit_device.vault.store import Vault

__all__ = [
    "HistoryItem",
    "add",
    "find",
    "forget",
    "forgotten",
    "has_all",
    "load",
    "problems_of",
    "record_tasks",
    "store",
    "tasks",
    "usable",
]

_KIND = "example"
_COUNTER = ("counter", "history")  # of examples ever added
_TASKS = ("counter", "tasks")


@dataclass(frozen=True)
class HistoryItem:
    """One example of one task. `part` is "test" for what a file holds out, else ""."""

    task: str
    fields: Mapping[str, str]  # those of the task's template, and its gold
    date: str = ""  # ISO 8601; undated ones count as older than all dated ones
    order: int = 0  # of adding, within equal dates
    part: str = ""
    imports: tuple[int, ...] = field(default=(), compare=False)  # that brought it; none: it came otherwise
    origin: str = field(default="", compare=False)  # where a file has it, for messages: "line 7"
    name: str = field(default="", compare=False)  # sha-256 over task and fields, hex

    def __post_init__(self) -> None:
        text = json.dumps([self.task, sorted(self.fields.items())])
        object.__setattr__(self, "imports", tuple(self.imports))
        object.__setattr__(self, "name", hashlib.sha256(text.encode()).hexdigest())

    @property
    def short(self) -> str:
        """What a person types to mean this example."""
        return self.name[:8]

    @classmethod
    def make(
        cls, task: Task, values: Mapping[str, Any], *, date: str = "", part: str = "", origin: str = ""
    ) -> HistoryItem:
        """From any mapping that has the task's fields. Raises InvalidData naming all that are wrong."""
        problems = problems_of(task, values)
        if problems:
            raise InvalidData("; ".join(problems))
        fields = {name: as_text(values[name]) or "" for name in task.fields_of(values)}
        # A gold outside task.labels stays: people may judge into folders of their own.
        return cls(task=task.name, fields=fields, date=date, part=part, origin=origin)


def problems_of(task: Task, values: Mapping[str, Any]) -> list[str]:
    """What is wrong with each field that the task needs."""
    whys = {name: _problem(values.get(name)) for name in task.fields_of(values)}
    return [f'field "{name}" {why}' for name, why in whys.items() if why]


def usable(items: Iterable[HistoryItem], task: Task) -> list[HistoryItem]:
    """Those that have the task's fields: it may have had others when an example was added."""
    return [item for item in items if not problems_of(task, item.fields)]


def _problem(value: Any) -> str:
    if value is None:
        return "is missing"
    if isinstance(value, int | float) and not isinstance(value, bool):
        # A whole number of thousands of digits is a number that Python does not write out.
        is_plain = math.isfinite(value) if isinstance(value, float) else abs(value) < 10**18
        return "" if is_plain else "is no number that can be written out"
    if not isinstance(value, str):
        return "is not text"
    if not is_text(value):
        return "is no text that UTF-8 can carry"
    return "" if value.strip() else "is empty"


def add(vault: Vault, items: Iterable[HistoryItem], *, number: int | None = None) -> tuple[int, int]:
    """Seal them, all or none: (how many are new, how many were there already).

    `number` is that of the import that brings them. What is added without one stays whatever import is
    undone.
    """
    added = duplicates = 0
    with vault.transaction():
        known = tasks(vault)
        order = int(vault.get(*_COUNTER) or b"0")
        for item in items:
            data = vault.get(_KIND, item.name)
            if data is None:
                order += 1
                store(vault, replace(item, order=order, imports=() if number is None else (number,)))
                known.add(item.task)
                added += 1
                continue
            duplicates += 1
            there = _read(data)
            if there.imports and number not in there.imports:
                store(vault, replace(there, imports=() if number is None else (*there.imports, number)))
        vault.put(*_COUNTER, str(order).encode())
        record_tasks(vault, known)
    return added, duplicates


def store(vault: Vault, item: HistoryItem) -> None:
    """Write its row, a new one or another version of it."""
    values = asdict(item) | {"fields": dict(item.fields)}
    del values["name"], values["origin"]
    if not item.imports:
        del values["imports"]  # so that an earlier perfit can read it
    vault.put(_KIND, item.name, json.dumps(values, ensure_ascii=False).encode(), sweep=False)


def _read(data: bytes) -> HistoryItem:
    try:
        return HistoryItem(**json.loads(data))
    except (ValueError, TypeError) as error:
        raise VaultDamaged("the vault holds an example that cannot be read") from error


def load(vault: Vault, task: str | None = None) -> list[HistoryItem]:
    """By time; of one task, or of all."""
    read = map(_read, vault.list(_KIND).values())
    items = [item for item in read if task is None or item.task == task]
    return sorted(items, key=lambda i: (i.task, i.date, i.order))


def tasks(vault: Vault) -> set[str]:
    """Names of the tasks that there are examples of, from a row of their own where that is up to date."""
    kept = json.loads(vault.get(*_TASKS) or b"{}")
    if kept.get("of") == _state(vault):
        return set(kept["tasks"])
    return {item.task for item in load(vault)}


def record_tasks(vault: Vault, names: Iterable[str]) -> None:
    """What `tasks` says until examples come or go again."""
    kept = {"of": _state(vault), "tasks": sorted(names)}
    vault.put(*_TASKS, json.dumps(kept).encode(), sweep=False)


def _state(vault: Vault) -> list[int]:
    """How many examples there are, and ever were: while both are the same, so are the examples' names."""
    return [vault.count(_KIND), int(vault.get(*_COUNTER) or b"0")]


def forget(vault: Vault, items: Iterable[HistoryItem]) -> int:
    """Delete these examples and their keys for good, and whatever else depends on them.

    That is every half-done update, all versions of the shift that may know them but the current one, the
    records of the last update, of refused examples and of insight, which hold digests of texts, the start
    that they chose, and kept answers.
    """
    from perfit_device import answers, personal

    items = list(items)
    count, forgot = 0, {item.task for item in items}
    imports = {number for item in items for number in item.imports}
    with vault.transaction():
        for item in items:
            count += vault.delete(_KIND, item.name)
        left = load(vault)
        record_tasks(vault, {item.task for item in left})
        for item in left:
            imports -= set(item.imports)
        for number in imports:  # nothing of it is left
            vault.delete("import", str(number))
        for kind in (
            "checkpoint",
            "refused",
            "finished",
            "influence",
            "start",
        ):  # their names end in the task
            for name in vault.list(kind):
                if name.rpartition("/")[2] in forgot:
                    vault.delete(kind, name)
        for task in forgot if personal.artefacts(vault) else ():  # only a shift can remember them
            names = [item.name for item in items if item.task == task]
            number = forgotten(vault, task) + 1
            personal.forget_examples(vault, {task}, names, number)
            vault.put("forgotten", task, str(number).encode())
        answers.forget_texts(vault, {text for item in items for text in item.fields.values()})
    return count


def has_all(vault: Vault, items: Iterable[HistoryItem]) -> bool:
    return all(vault.has(_KIND, item.name) for item in items)


def forgotten(vault: Vault, task: str) -> int:
    """How many times examples of a task were forgotten, which shows what a shift may remember."""
    return int(vault.get("forgotten", task) or b"0")


def find(items: Sequence[HistoryItem], prefixes: Sequence[str]) -> list[HistoryItem]:
    """The examples meant by the first characters of their names. Raises NotFound or InvalidInput."""
    found = []
    for prefix in prefixes:
        matches = [i for i in items if i.name.startswith(prefix.lower())] if len(prefix) >= 4 else []
        if not matches:
            raise NotFound(f'no example "{prefix[:64]}"; `perfit history list` shows the names')
        if len(matches) > 1:
            raise InvalidInput(f'"{prefix}" means {len(matches)} examples; type more of the name')
        found.append(matches[0])
    return found
