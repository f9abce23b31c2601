"""Imports: what brought which examples, so that one can be taken back as a whole.

    import   NUMBER   JSON: when, from what, and how much

An example names the imports that brought it. One that was there by other means names none, and no undoing
of an import takes it away.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from perfit_device.history.items import HistoryItem, add, forget, load, store
from perfit_shared.errors import NotFound, VaultDamaged

if TYPE_CHECKING:
    from perfit_device.vault.store import Vault

__all__ = ["Import", "add_import", "list_imports", "undo_import"]

_KIND = "import"
_COUNTER = ("counter", "imports")


@dataclass(frozen=True)
class Import:
    """One import. `alone` of its examples are there by it alone, so that undoing it forgets them."""

    number: int
    date: str
    format: str
    file: str  # name without folder
    task: str  # several with commas
    added: int
    known: int  # that were there already
    skipped: int  # of the source, that are no examples
    alone: int = 0


def add_import(vault: Vault, items: Iterable[HistoryItem], about: Import) -> Import:
    """Seal all of them, or none. Number, date and counts of `about` are filled in."""
    with vault.transaction():
        number = int(vault.get(*_COUNTER) or b"0") + 1
        added, known = add(vault, items, number=number)
        date = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"
        done = replace(about, number=number, date=date, added=added, known=known, alone=added)
        vault.put(_KIND, str(number), json.dumps(asdict(done), ensure_ascii=False).encode())
        vault.put(*_COUNTER, str(number).encode())
    return done


def list_imports(vault: Vault) -> list[Import]:
    """Oldest first."""
    items = load(vault)
    found = []
    for data in vault.list(_KIND).values():
        try:
            about = Import(**json.loads(data))
        except (ValueError, TypeError) as error:
            raise VaultDamaged("the vault holds an import that cannot be read") from error
        found.append(replace(about, alone=sum(item.imports == (about.number,) for item in items)))
    return sorted(found, key=lambda about: about.number)


def undo_import(vault: Vault, number: int) -> tuple[Sequence[HistoryItem], int]:
    """(forgotten examples, how many stay since another import brought them too). Raises NotFound."""
    if not vault.has(_KIND, str(number)):
        raise NotFound(f"there is no import {number}; `perfit history imports` shows them")
    brought = [item for item in load(vault) if number in item.imports]
    alone = [item for item in brought if item.imports == (number,)]
    with vault.transaction():
        for item in brought:
            if item.imports != (number,):
                store(vault, replace(item, imports=tuple(n for n in item.imports if n != number)))
        forget(vault, alone)
        vault.delete(_KIND, str(number))
    return alone, len(brought) - len(alone)
