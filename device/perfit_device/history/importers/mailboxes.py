"""Where mails lie: an mbox file or a Maildir, mail by mail, each as its first megabyte."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from perfit_device.history.importers.source import Source
from perfit_shared.errors import InvalidData

__all__ = ["Mailbox", "is_maildir", "is_mbox"]

_MAIL_BYTES = 1 << 20  # that are read of a mail: what stands behind are attachments
_LINE = 1 << 16
_MOST = 500_000  # mails
_FROM = re.compile(rb"From [^\n]{1,1000}\n(>?From [^\n]*\n)?[!-9;-~]{1,80}:")
_ESCAPED = re.compile(rb"^>(>*From )", re.MULTILINE)


def is_mbox(source: Source) -> bool:
    return _FROM.match(source.head.replace(b"\r\n", b"\n")) is not None


def is_maildir(folder: Path) -> bool:
    return (folder / "cur").is_dir() and (folder / "new").is_dir()


class Mailbox:
    """`keys` lists its mails with their fronts; `read` gives one again."""

    def __init__(self, source: Source) -> None:
        self._source = source

    def fronts(self) -> Iterator[tuple[str, int | str, bytes]]:
        """(place, key, bytes) of every mail. Raises InvalidData."""
        mails: Iterator[tuple[int | str, bytes]]
        mails = self._of_folder() if self._source.is_folder else self._of_file()
        for number, (key, data) in enumerate(mails):
            if number == _MOST:
                raise InvalidData(f"more than {_MOST} mails; split it")
            place = key if isinstance(key, str) else f"mail {number + 1}"
            yield place, key, data

    def read(self, key: int | str) -> bytes:
        """Raises InvalidData where it is gone."""
        if isinstance(key, str):
            return _front_of(self._source.path / key)
        with self._source.open() as file:
            file.seek(key)
            return next(_split(file, key), (key, b""))[1]

    def _of_file(self) -> Iterator[tuple[int | str, bytes]]:
        with self._source.open() as file:
            yield from _split(file, 0)

    def _of_folder(self) -> Iterator[tuple[int | str, bytes]]:
        """Of the folder and those below it. Links are not followed."""
        folder = self._source.path
        for root, folders, files in os.walk(folder, followlinks=False):
            folders.sort()
            if Path(root).name not in ("cur", "new"):
                continue
            for name in sorted(files):
                path = Path(root, name)
                if stat.S_ISREG(path.lstat().st_mode):
                    yield str(path.relative_to(folder)), _front_of(path)


def _front_of(path: Path) -> bytes:
    with Source(path).open() as file:
        return file.read(_MAIL_BYTES)


def _split(file: BinaryIO, offset: int) -> Iterator[tuple[int, bytes]]:
    """(offset, front) of the mails behind `offset`, where one begins."""
    start, parts, size, is_blank, is_start = -1, list[bytes](), 0, True, True
    while line := file.readline(_LINE):
        if is_start and is_blank and line.startswith(b"From "):
            if start >= 0:
                yield start, _unescaped(parts)
            start, parts, size = offset, [], 0
        elif size < _MAIL_BYTES:
            parts.append(line)
            size += len(line)
        offset += len(line)
        is_blank = is_start and not line.strip()
        is_start = line.endswith(b"\n")
    if start >= 0:
        yield start, _unescaped(parts)


def _unescaped(lines: list[bytes]) -> bytes:
    return _ESCAPED.sub(rb"\1", b"".join(lines))
