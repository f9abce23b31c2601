"""A history file as far as it can be read without knowing its format."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from perfit_device.history.importers.text import decoded, read_bytes
from perfit_shared.json_input import parse_json
from perfit_shared.tasks import Task

__all__ = ["TABLES", "Source"]

TABLES = (".csv", ".tsv", ".tab")  # names of tables, whatever they hold


@dataclass(frozen=True)
class Source:
    """What the formats read."""

    path: Path
    text: str
    records: Any  # of a JSON array, else None
    notify: Callable[[str], None]  # takes a line about what was assumed or left out
    user: str | None = None  # whose history, in a file of several people
    tasks: Mapping[str, Task] = field(default_factory=dict)  # tasks by their names, beside perfit's own

    @classmethod
    def read(cls, path: Path, data: bytes | None, notify: Callable[[str], None], **more: Any) -> Source:
        """`data` where it was read already, from stdin. Raises InvalidData."""
        text = decoded(read_bytes(path) if data is None else data, notify)
        is_array = text.lstrip()[:1] == "[" and path.suffix.lower() not in TABLES
        return cls(path, text, parse_json(text) if is_array else None, notify, **more)
