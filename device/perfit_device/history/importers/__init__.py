"""History files: `read_history` reads any; one module a format.

    JSONL  {"text": "…", "title": "…", "date": "2024-05-01", "part": "test"}   a line an example
    JSON   a list of the same
    CSV    the same names in the first row; commas, semicolons, tabs or bars
    LaMP   [{"user_id", "profile": [{task fields}], "query": [{"id", "input", "gold"}]}]
    ours   what `perfit history list --json` prints

`date` (ISO 8601) and `part` ("test": never trained on) may be left out. The format shows in the
content; a name that ends in .csv or .tsv says that it is a table. Every problem is InvalidData that
names the file, the item and all fields that are wrong; only entries of LaMP files that have an empty
field are passed over.

A format is a module with `fits(source)`, whether the file is of it, and `read(source, task)`, its examples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from perfit_device.history.importers import jsonl, lamp, listing, table
from perfit_device.history.importers.source import Source
from perfit_device.history.items import HistoryItem
from perfit_shared.errors import InvalidData
from perfit_shared.json_input import error_context
from perfit_shared.tasks import Task

__all__ = ["read_history"]

_FORMATS = (lamp, table, jsonl)  # the first that fits


def read_history(
    path: Path,
    task: Task | None,
    *,
    default: Callable[[], Task] | None = None,
    data: bytes | None = None,
    user: str | None = None,
    tasks: Mapping[str, Task] | None = None,
    notify: Callable[[str], None] = lambda _: None,
) -> list[HistoryItem]:
    """All examples of a file, of the user named `user` where it holds several people.

    They are of `task`, or where that is None, of the tasks that our own listing names (looked up in
    `tasks`, by their names), and in other files of `default()`. `data` is the file's content where it was
    read already. `notify` gets lines about assumptions. Raises InvalidData; then the caller should
    keep nothing of it.
    """
    with error_context(str(path)):
        source = Source.read(path, data, notify, user=user, tasks=tasks or {})
        if user is not None and not lamp.fits(source):
            raise InvalidData("this file holds one person; --user is for LaMP files")
        if listing.fits(source):
            found = listing.read(source, task)
        else:
            if task is None:
                if default is None:
                    raise InvalidData("say which task the examples are of, with --task NAME")
                task = default()
            found = next(form for form in _FORMATS if form.fits(source)).read(source, task)
        if not found:
            raise InvalidData("there are no examples in it")
        return found
