"""What a history is imported from: `read_history` reads any source; one module a format.

The format shows in the content; a name that ends in .csv or .tsv says that it is a table. Every problem is
InvalidData that names the source, the place and all fields that are wrong, and then nothing is kept. What a
source holds that is no example by its nature (others' mails, merges) is counted in the report, by reason.
docs/importing.md describes the formats.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from perfit_device.history.importers import (
    chatgpt,
    chats,
    git,
    jsonl,
    lamp,
    listing,
    mail,
    markdown,
    spreadsheet,
    table,
)
from perfit_device.history.importers.choices import Choices, Report, Skipped, newest
from perfit_device.history.importers.source import Format, Source
from perfit_device.history.importers.text import cannot_be_read
from perfit_device.history.items import HistoryItem
from perfit_shared.errors import InvalidData
from perfit_shared.json_input import error_context
from perfit_shared.terminal import one_line

if TYPE_CHECKING:
    from perfit_shared.tasks import Task

__all__ = ["FORMATS", "Choices", "Report", "Skipped", "read_history"]


# The first that fits; `listing` is apart, since its examples say their tasks.
_FOLDERS = (mail, chatgpt, git, markdown)
_BINARY = (mail, chatgpt, markdown, spreadsheet)  # and what need not be read as a whole
_TEXTS = (lamp, chats, table, jsonl)
FORMATS: dict[str, Format] = {m.FORMAT.name: m.FORMAT for m in (listing, *_FOLDERS, spreadsheet, *_TEXTS)}


def read_history(
    path: Path,
    task: Task | None,
    *,
    default: Callable[[Sequence[str]], Task] | None = None,
    data: bytes | None = None,
    choices: Choices | None = None,
    report: Report | None = None,
    tasks: Mapping[str, Task] | None = None,
) -> list[HistoryItem]:
    """All examples of a source that `choices` takes.

    They are of `task`, or where that is None, of the tasks that our own listing names (looked up in
    `tasks`, by their names), and in other sources of `default(names that suit the format)`. `data` is the
    content where it was read already. Raises InvalidData; then the caller should keep nothing of it.
    """
    choices, report = choices or Choices(), report or Report()
    with error_context(one_line(str(path))), _readable():
        source = Source(path, data, choices, report, tasks or {})
        form = _format_of(source)
        report.name, report.format = form.name, form.kind
        choices.check(form.reads, form.kind)
        if form is listing.FORMAT:
            items: Iterable[HistoryItem] = listing.read(source, task)
        else:
            if task is None:
                if default is None:
                    raise InvalidData("say which task the examples are of, with --task NAME")
                task = default(form.tasks)
            items = form.read(source, task)
        found = newest(items, choices.last, report)
        if not found:
            raise InvalidData("there are no examples in it" + _why(report))
        return found


@contextlib.contextmanager
def _readable() -> Iterator[None]:
    """A disk that fails half-way is an answer too."""
    try:
        yield
    except OSError as error:
        raise cannot_be_read(error) from error


def _format_of(source: Source) -> Format:
    named = source.choices.format
    if named is not None:
        if named not in FORMATS:
            raise InvalidData(f'there is no format "{named[:40]}"; there are {", ".join(FORMATS)}')
        return FORMATS[named]
    if source.is_folder:
        if found := _first_that_fits(source, _FOLDERS):
            return found
        raise InvalidData("a folder of no mail (Maildir), Markdown, git repository or export of ChatGPT")
    found = _first_that_fits(source, _BINARY) or _first_that_fits(source, (listing, *_TEXTS))
    return found or jsonl.FORMAT


def _first_that_fits(source: Source, modules: Iterable[ModuleType]) -> Format | None:
    forms: Iterable[Format] = (module.FORMAT for module in modules)
    return next((form for form in forms if form.fits(source)), None)


def _why(report: Report) -> str:
    """What was left out, behind a message that nothing is left."""
    said = ", ".join(f"{each.count} {each.reason}" for each in report.skipped)
    return f" ({said})" if said else ""
