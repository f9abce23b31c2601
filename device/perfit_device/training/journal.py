"""What became of each update, accepted or not, and what `evaluate` measured last. No text, no digest of one.

`known` says which examples an update had: those that were added up to then. It outlives an undo, so that
nothing trains on the same history again by itself.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from perfit_device.vault.store import Vault

__all__ = ["Entry", "Measured", "add", "now", "read", "read_measured", "write_measured"]

_KIND, _MEASURED = "updates", "measured"
_MOST = 100  # entries


@dataclass(frozen=True)
class Entry:
    """One update. Losses are in nats a token; those of training are means over the first and last epoch."""

    date: str  # ISO 8601, UTC
    known: int  # largest `order` among the examples of the history
    examples: int  # that trained
    judges: int  # examples that judged
    train_before: float
    train_after: float
    gate_before: float  # of what training began with
    gate_after: float
    error: float  # standard error of the difference at the gate
    accepted: bool
    version: int | None = None  # number, where accepted
    seconds: float = 0.0


@dataclass(frozen=True)
class Measured:
    """Of the test part, by the name of the shift."""

    date: str
    version: int | None  # of the personal shift, None: there was none
    examples: int
    metric_name: str
    loss: Mapping[str, float]
    metric: Mapping[str, float]

    @property
    def best(self) -> str:
        """The shift that loses least."""
        return min(self.loss, key=lambda name: self.loss[name])


def now() -> str:
    return f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"


def read(vault: Vault, row: str) -> list[Entry]:
    """Oldest first; `row` is that of the checkpoint. What another version of perfit wrote does not count."""
    try:
        return [Entry(**values) for values in json.loads(vault.get(_KIND, row) or b"[]")]
    except (ValueError, TypeError):
        return []


def add(vault: Vault, row: str, entry: Entry) -> None:
    entries = [*read(vault, row), entry][-_MOST:]
    vault.put(_KIND, row, json.dumps([asdict(each) for each in entries]).encode())


def read_measured(vault: Vault, row: str) -> Measured | None:
    try:
        return Measured(**json.loads(vault.get(_MEASURED, row) or b""))
    except (ValueError, TypeError):
        return None


def write_measured(vault: Vault, row: str, measured: Measured) -> None:
    vault.put(_MEASURED, row, json.dumps(asdict(measured)).encode())
