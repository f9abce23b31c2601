"""What is to be imported, as far as it can be read without knowing its format."""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

from perfit_device.history.importers.choices import Choices, Report
from perfit_device.history.importers.text import cannot_be_read, decoded, read_bytes
from perfit_device.history.items import HistoryItem
from perfit_shared.errors import InvalidData
from perfit_shared.json_input import parse_json
from perfit_shared.tasks import Task

__all__ = ["TABLES", "Format", "Source", "check_sizes"]

TABLES = (".csv", ".tsv", ".tab")  # names of tables, whatever they hold
_HEAD = 1 << 16  # bytes by which a format is known
_ARCHIVE = b"PK\x03\x04"
_END = b"PK\x05\x06"  # of a zip archive's list of members
_LIST_BYTES = 4 << 20  # of that list: zipfile makes an object of each entry
_MEMBER_BYTES = 1 << 30  # unpacked


@dataclass(frozen=True)
class Source:
    """What the formats read: a file, a folder, or what came from stdin."""

    path: Path
    data: bytes | None = None  # where it was read already
    choices: Choices = field(default_factory=Choices)
    report: Report = field(default_factory=Report)
    tasks: Mapping[str, Task] = field(default_factory=dict)  # tasks by their names, beside perfit's own

    @cached_property
    def is_folder(self) -> bool:
        return self.data is None and self.path.is_dir()

    @cached_property
    def head(self) -> bytes:
        """The first bytes of a file; none of a folder. Raises InvalidData."""
        if self.is_folder:
            return b""
        with self.open() as file:
            return file.read(_HEAD)

    def open(self) -> BinaryIO:
        """Raises InvalidData."""
        if self.data is not None:
            return io.BytesIO(self.data)
        try:
            if not self.path.is_file():  # a pipe would never end
                self.path.stat()
                raise InvalidData("cannot be read (neither a file nor a folder)")
            return self.path.open("rb")
        except (OSError, ValueError) as error:
            raise cannot_be_read(error) from error

    @cached_property
    def text(self) -> str:
        """All of it. Raises InvalidData."""
        data = read_bytes(self.path) if self.data is None else self.data
        return decoded(data, self.report.notify)

    @cached_property
    def records(self) -> Any:
        """Those of a JSON array, else None."""
        is_array = self.text.lstrip()[:1] == "[" and self.path.suffix.lower() not in TABLES
        return parse_json(self.text) if is_array else None

    @cached_property
    def members(self) -> tuple[str, ...]:
        """Names in a zip archive; none where it is no archive, or one with too long a list."""
        if not self.head.startswith(_ARCHIVE):
            return ()
        with self.open() as file:
            if not _has_short_list(file):
                return ()
            try:
                with zipfile.ZipFile(file) as archive:
                    return tuple(archive.namelist())
            except (zipfile.BadZipFile, OSError, ValueError, struct.error, NotImplementedError):
                return ()


@dataclass(frozen=True)
class Format:
    name: str  # what --format takes
    kind: str  # what it is, for a person
    fits: Callable[[Source], bool]  # whether a source is of it
    read: Callable[[Source, Task], Iterable[HistoryItem]]  # the examples, one after the other
    tasks: tuple[str, ...] = ()  # names of those that suit it, the best first; none: the profile's default
    reads: tuple[str, ...] = ()  # which choices mean something in it


def _has_short_list(file: BinaryIO) -> bool:
    size = file.seek(0, io.SEEK_END)
    file.seek(max(size - (1 << 16) - 22, 0))
    tail = file.read()
    at = tail.rfind(_END)
    file.seek(0)
    if at < 0 or len(tail) < at + 22:
        return False
    return int(struct.unpack_from("<I", tail, at + 12)[0]) <= _LIST_BYTES


def check_sizes(archive: zipfile.ZipFile, most: int = _MEMBER_BYTES) -> None:
    """Raises InvalidData where the members say that they unpack to more than `most` bytes.

    zipfile reads no more of a member than its size says.
    """
    if sum(member.file_size for member in archive.infolist()) > most:
        raise InvalidData(f"the archive unpacks to more than {most >> 20} MiB")
