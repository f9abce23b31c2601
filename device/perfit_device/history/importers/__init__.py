"""History files, one module a format: `jsonl`, `table` (CSV and its kin), `lamp`, and our own `listing`.

    JSONL  {"text": "…", "title": "…", "date": "2024-05-01", "part": "test"}   a line an example
    JSON   a list of the same
    CSV    the same names in the first row; commas, semicolons, tabs or bars
    LaMP   [{"user_id", "profile": [{task fields}], "query": [{"id", "input", "gold"}]}]
    ours   what `perfit history list --json` prints

`date` (ISO 8601) and `part` ("test": never trained on) may be left out. The format shows in the
content; a name that ends in .csv or .tsv says that it is a table. Every problem is InvalidData that
names the file, the item and all fields that are wrong; only entries of LaMP files that have an empty
field are passed over.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perfit_device.history.importers import jsonl, lamp, listing, table
from perfit_device.history.importers.rows import Found
from perfit_device.history.importers.text import decoded, read_bytes
from perfit_device.history.items import HistoryItem
from perfit_shared.errors import InvalidData
from perfit_shared.lamp import at, parse_json
from perfit_shared.tasks import Task

__all__ = ["Found", "HistoryFile", "read_history"]

_TABLES = (".csv", ".tsv", ".tab")
_LINES = (".json", ".jsonl", ".ndjson")


@dataclass(frozen=True)
class HistoryFile:
    """A file as far as it can be read without knowing its task."""

    path: Path
    text: str
    records: Any  # of a JSON array, else None
    tell: Callable[[str], None]

    @classmethod
    def read(
        cls, path: Path, *, data: bytes | None = None, tell: Callable[[str], None] = lambda _: None
    ) -> HistoryFile:
        """`data` where it was read already, from stdin. `tell` is given a line about what was assumed.

        Raises InvalidData.
        """
        with at(str(path)):
            text = decoded(read_bytes(path) if data is None else data, tell)
            is_array = text.lstrip()[:1] == "[" and path.suffix.lower() not in _TABLES
            return cls(path, text, parse_json(text) if is_array else None, tell)

    @property
    def is_listing(self) -> bool:
        """Whether every example says itself which task it is of."""
        return listing.fits(self.records)

    def examples(
        self, task: Task | None, *, user: str | None = None, known: Mapping[str, Task] | None = None
    ) -> list[Found]:
        """All examples for one task, of the user named `user` where the file holds several people.

        `task` may be None for a listing alone, whose tasks are looked up in `known`, by their names.
        Raises InvalidData; then nothing should be kept of it.
        """
        with at(str(self.path)):
            if user is not None and not lamp.fits(self.records):
                raise InvalidData("this file holds one person; --user is for LaMP files")
            found = self._examples(task, user, known or {})
            if not found:
                raise InvalidData("there are no examples in it")
            return found

    def _examples(self, task: Task | None, user: str | None, known: Mapping[str, Task]) -> list[Found]:
        if self.is_listing:
            return listing.read(self.records, task, known, self.tell)
        if task is None:
            raise InvalidData("say which task the examples are of, with --task NAME")
        if lamp.fits(self.records):
            return lamp.read(self.path, self.records, task, user=user, tell=self.tell)
        if self.records is not None:
            return jsonl.read_list(self.records, task)
        if self._is_table:
            return table.read(self.text, task)
        return jsonl.read(self.text, task)

    @property
    def _is_table(self) -> bool:
        suffix = self.path.suffix.lower()
        return suffix in _TABLES or (suffix not in _LINES and self.text.lstrip()[:1] != "{")


def read_history(
    path: Path, task: Task, *, user: str | None = None, tell: Callable[[str], None] = lambda _: None
) -> list[HistoryItem]:
    """All examples of a file for one task. Raises InvalidData."""
    return [found.item for found in HistoryFile.read(path, tell=tell).examples(task, user=user)]
