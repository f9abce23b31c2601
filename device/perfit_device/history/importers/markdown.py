"""Markdown: a folder of documents, or one file, an example each.

A document's title is `title` of its front matter, else its first heading, else its file's name; its body is
the rest. Where the task's answer is a `title`, the body is the text and the title the answer. Where the
front matter has the answer (`category`, `tag`), the body is the text. For other tasks the title is the text
and the body the answer: what the person writes under such a title.
"""

from __future__ import annotations

import os
import re
import stat
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from perfit_device.history.importers.choices import Report
from perfit_device.history.importers.source import Format, Source
from perfit_device.history.importers.text import decoded
from perfit_device.history.items import HistoryItem
from perfit_shared.errors import InvalidData
from perfit_shared.json_input import is_date
from perfit_shared.tasks import Task

__all__ = ["FORMAT"]

_SUFFIXES = (".md", ".markdown", ".mdown")
_LARGEST = 1 << 20  # bytes of a document
_ENTRIES = 200_000  # of all folders together
_NOT_ENTERED = ("node_modules", "__pycache__")
_FRONT = re.compile(r"(---|\+\+\+)[ \t]*\n")
_LINE = re.compile(r"([A-Za-z_][A-Za-z0-9_-]{0,63})[ \t]*:[ \t]*(.*)")
_HEADING = re.compile(r"#{1,6}[ \t]+(.+)")
_DATED_NAME = re.compile(r"(\d{4}-\d\d-\d\d)[-_ ]?(.*)")


def fits(source: Source) -> bool:
    if source.is_folder:
        return next(_documents(source.path, Report()), None) is not None
    return source.path.suffix.lower() in _SUFFIXES


def read(source: Source, task: Task) -> Iterator[HistoryItem]:
    paths = _documents(source.path, source.report) if source.is_folder else iter([source.path])
    for path in paths:
        place = str(path.relative_to(source.path)) if source.is_folder else path.name
        try:
            text = _text_of(source, path)
        except InvalidData as error:
            if not source.is_folder:
                raise
            source.report.skip(str(error), place)
            continue
        if item := _example(text, path, place, task, source.report):
            yield item


def _documents(folder: Path, report: Report) -> Iterator[Path]:
    """In the order of their names. Links, hidden folders and what is no file are not followed."""
    entries = 0
    for root, folders, files in os.walk(folder, followlinks=False):
        folders[:] = sorted(n for n in folders if not n.startswith(".") and n not in _NOT_ENTERED)
        for name in sorted(files):
            entries += 1
            path = Path(root, name)
            if path.suffix.lower() not in _SUFFIXES:
                continue
            if stat.S_ISREG(path.lstat().st_mode):
                yield path
            else:
                report.skip("a link, or no file", str(path.relative_to(folder)))
        entries += len(folders)
        if entries > _ENTRIES:
            raise InvalidData(f"more than {_ENTRIES} files; choose a folder in it")


def _text_of(source: Source, path: Path) -> str:
    with (Source(path) if source.is_folder else source).open() as file:
        data = file.read(_LARGEST + 1)
    if len(data) > _LARGEST:
        raise InvalidData(f"larger than {_LARGEST >> 20} MiB")
    if not data.strip():
        raise InvalidData("empty")
    try:
        return decoded(data, source.report.notify, may_be_html=True).replace("\r\n", "\n")
    except InvalidData as error:
        raise InvalidData("not text in an encoding that is known") from error


def _example(text: str, path: Path, place: str, task: Task, report: Report) -> HistoryItem | None:
    front, text = _front_matter(text)
    named = _DATED_NAME.fullmatch(path.stem)
    date = front.get("date", "") or (named[1] if named else "")
    title, body = _title_and_body(text)
    title = front.get("title", "") or title or (named[2] if named else path.stem).replace("-", " ").strip()
    values = {name: front[name] for name in task.field_names if name in front}
    if task.gold_field == "title" or task.gold_field in values:
        values = {task.text_field: body, "title": title} | values
    else:
        values = {task.text_field: title, task.gold_field: body} | values
    if not body.strip():
        report.skip("without text under the title", place)
        return None
    try:
        return HistoryItem.make(task, values, date=date if is_date(date) else "", origin=place)
    except InvalidData as error:
        report.skip(f"without what {task.name} needs ({error})", place)
        return None


def _front_matter(text: str) -> tuple[dict[str, str], str]:
    """(plain values by name, the rest). Of YAML only lines like `name: value` are read."""
    opened = _FRONT.match(text)
    if not opened:
        return {}, text
    close = text.find(f"\n{opened[1]}", opened.end() - 1)
    if close < 0:
        return {}, text
    inside, rest = text[opened.end() : close], text[close + 1 :].partition("\n")[2]
    values: dict[str, Any] = {}
    if opened[1] == "+++":
        try:
            values = tomllib.loads(inside)
        except (tomllib.TOMLDecodeError, RecursionError):
            values = {}
    else:
        found = (_LINE.fullmatch(line.rstrip()) for line in inside.splitlines())
        values = {match[1]: match[2].strip("\"' ") for match in found if match}
    return {name.lower(): str(value) for name, value in values.items() if str(value).strip()}, rest


def _title_and_body(text: str) -> tuple[str, str]:
    """The first heading, where nothing stands above it, and the rest."""
    lines = text.strip().split("\n")
    if match := _HEADING.fullmatch(lines[0].rstrip()):
        return match[1].rstrip("# \t"), "\n".join(lines[1:]).strip()
    if len(lines) > 1 and lines[0].strip() and re.fullmatch(r"=+|-+", lines[1].strip()):
        return lines[0].strip(), "\n".join(lines[2:]).strip()
    return "", text.strip()


FORMAT = Format("markdown", "Markdown", fits, read)
