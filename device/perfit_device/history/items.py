"""One example, and the examples of a vault: one sealed row each."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from perfit_device import personal
from perfit_device.vault.store import Vault
from perfit_shared.errors import InvalidData, InvalidInput, NotFound, VaultDamaged
from perfit_shared.json_input import as_text, is_text
from perfit_shared.tasks import Task

__all__ = ["HistoryItem", "add", "find", "forget", "forgotten", "load", "problems_of", "usable"]

_KIND = "example"


@dataclass(frozen=True)
class HistoryItem:
    """One example of one task. `part` is "test" for what a file holds out, else ""."""

    task: str
    fields: Mapping[str, str]  # those of the task's template, and its gold
    date: str = ""  # ISO 8601; undated ones count as older than all dated ones
    order: int = 0  # of adding, within equal dates
    part: str = ""
    origin: str = field(default="", compare=False)  # where a file has it, for messages: "line 7"
    name: str = field(default="", compare=False)  # sha-256 over task and fields, hex

    def __post_init__(self) -> None:
        text = json.dumps([self.task, sorted(self.fields.items())])
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


def add(vault: Vault, items: Iterable[HistoryItem]) -> tuple[int, int]:
    """Seal them, all or none: (how many are new, how many were there already)."""
    added = duplicates = 0
    with vault.transaction():
        order = int(vault.get("counter", "history") or b"0")
        for item in items:
            if vault.has(_KIND, item.name):
                duplicates += 1
                continue
            order += 1
            values = asdict(item) | {"order": order, "fields": dict(item.fields)}
            del values["name"], values["origin"]
            vault.put(_KIND, item.name, json.dumps(values, ensure_ascii=False).encode())
            added += 1
        vault.put("counter", "history", str(order).encode())
    return added, duplicates


def load(vault: Vault, task: str | None = None) -> list[HistoryItem]:
    """By time; of one task, or of all."""
    items = []
    for data in vault.list(_KIND).values():
        try:
            item = HistoryItem(**json.loads(data))
        except (ValueError, TypeError) as error:
            raise VaultDamaged("the vault holds an example that cannot be read") from error
        if task is None or item.task == task:
            items.append(item)
    return sorted(items, key=lambda i: (i.task, i.date, i.order))


def forget(vault: Vault, items: Iterable[HistoryItem]) -> int:
    """Delete these examples and their keys for good, and whatever else depends on them.

    That is every half-done update, all versions of the shift but the current one, and the records of the
    last update and of refused examples, which hold digests of texts.
    """
    count, tasks = 0, set()
    with vault.transaction():
        for item in items:
            count += vault.delete(_KIND, item.name)
            tasks.add(item.task)
        for kind in ("checkpoint", "refused", "finished"):  # their names end in the task
            for name in vault.list(kind):
                if name.rpartition("/")[2] in tasks:
                    vault.delete(kind, name)
        personal.forget_earlier(vault, tasks)
        for task in tasks if personal.artefacts(vault) else ():  # only a shift can remember them
            vault.put("forgotten", task, str(forgotten(vault, task) + 1).encode())
    return count


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
