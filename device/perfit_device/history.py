"""A user's examples, one sealed row each: what a personal shift is trained, gated and tested on."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from perfit_device.vault import Vault
from perfit_shared.errors import InvalidData, InvalidInput, NotFound, VaultDamaged
from perfit_shared.tasks import Task

__all__ = ["MINIMUM", "HistoryItem", "Split", "add", "find", "forget", "load", "split"]

_KIND = "example"
MINIMUM = 10  # examples that an update needs: 4 to train, 3 to gate, 3 to test
_SMALLEST_PART = 3
_GATE_SHARE, _TEST_SHARE = 0.12, 0.18
_GATE_SHARE_WITH_TEST = 0.15  # where the file set its own test part apart


@dataclass(frozen=True)
class HistoryItem:
    """One example of one task. `part` is "test" for what a file holds out, else ""."""

    task: str
    fields: Mapping[str, str]  # those of the task's template, and its gold
    date: str = ""  # ISO 8601; undated ones count as older than all dated ones
    order: int = 0  # of adding, within equal dates
    part: str = ""
    name: str = field(default="", compare=False)  # sha-256 over task and fields, hex

    def __post_init__(self) -> None:
        text = json.dumps([self.task, sorted(self.fields.items())])
        object.__setattr__(self, "name", hashlib.sha256(text.encode()).hexdigest())

    @property
    def short(self) -> str:
        """What a person types to mean this example."""
        return self.name[:8]

    @classmethod
    def make(cls, task: Task, values: Mapping[str, Any], *, date: str = "", part: str = "") -> HistoryItem:
        """From any mapping that has the task's fields. Raises InvalidData naming the field."""
        names = task.fields_of(values)
        for name in names:
            value = values.get(name)
            if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
                continue
            if not isinstance(value, str) or not value.strip():
                raise InvalidData(f'field "{name}" is missing, empty or not text')
        fields = {name: str(values[name]).strip() for name in names}
        # A gold outside task.labels stays: people may judge into folders of their own.
        return cls(task=task.name, fields=fields, date=date, part=part)


@dataclass(frozen=True)
class Split:
    """A history by time. `train` and `gate` make the shift; `test` is for `evaluate` alone."""

    train: Sequence[HistoryItem]
    gate: Sequence[HistoryItem]
    test: Sequence[HistoryItem]

    def digest(self) -> str:
        """sha-256 over what an update reads, hex: an interrupted update resumes on the same."""
        text = json.dumps([[i.name for i in self.train], [i.name for i in self.gate]])
        return hashlib.sha256(text.encode()).hexdigest()


def split(items: Iterable[HistoryItem]) -> Split:
    """Oldest to train on, then the gate, and the newest to test; the one place with this rule.

    70 / 12 / 18 %, at least 3 in gate and test. Where a file set a test part apart that part is
    the test, and the rest goes 85 / 15 to train and gate. Raises InvalidData on fewer than 10 in all,
    or fewer than 7 beside a test part.
    """
    ordered = sorted(items, key=lambda i: (i.date, i.order))
    test = [i for i in ordered if i.part == "test"]
    rest = [i for i in ordered if i.part != "test"]
    needed = MINIMUM - _SMALLEST_PART if test else MINIMUM
    if len(rest) < needed:
        raise InvalidData(
            f"there are {len(rest)} examples to learn from, and at least {needed} are needed; "
            "add some with `perfit history add` or `perfit history import`"
        )
    if not test:
        count = max(_SMALLEST_PART, round(len(rest) * _TEST_SHARE))
        rest, test = rest[:-count], rest[-count:]
        gate_count = max(_SMALLEST_PART, round(len(ordered) * _GATE_SHARE))
    else:
        gate_count = max(_SMALLEST_PART, round(len(rest) * _GATE_SHARE_WITH_TEST))
    return Split(train=rest[:-gate_count], gate=rest[-gate_count:], test=test)


def add(vault: Vault, items: Iterable[HistoryItem]) -> tuple[int, int]:
    """Seal them, all or none: (how many are new, how many were there already)."""
    added = known = 0
    with vault.transaction():
        order = int(vault.get("counter", "history") or b"0")
        for item in items:
            if vault.has(_KIND, item.name):
                known += 1
                continue
            order += 1
            values = asdict(item) | {"order": order, "fields": dict(item.fields)}
            del values["name"]
            vault.put(_KIND, item.name, json.dumps(values, ensure_ascii=False).encode())
            added += 1
        vault.put("counter", "history", str(order).encode())
    return added, known


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
    """Delete these examples and their keys for good, and every half-done update that saw them."""
    count, tasks = 0, set()
    with vault.transaction():
        for item in items:
            count += vault.delete(_KIND, item.name)
            tasks.add(item.task)
        for name in vault.list("checkpoint"):
            if name.rpartition("/")[2] in tasks:
                vault.delete("checkpoint", name)
    return count


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
