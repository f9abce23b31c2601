"""What a change of a repository is about, in a line: the `changes` of the task commit_message.

    src/a.py +12 -3; docs/b.md +1 -0; 3 more | in parse, Reader | adds limit, Busy | removes retries

Paths with added and removed lines; the functions that git's hunk headers name; the names that occur more
often in what is added than in what is removed, and the other way round, most frequent first. No code.
"""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from perfit_shared.terminal import one_line

__all__ = ["DIFF_OPTIONS", "changes_of_diff"]

# For git: the same patch whatever its configuration says.
DIFF_OPTIONS = (
    "--patch",
    "--no-color",
    "--no-ext-diff",
    "--no-textconv",
    "--find-renames",
    "--unified=3",
    "--diff-algorithm=myers",
    "--src-prefix=a/",
    "--dst-prefix=b/",
    "--submodule=short",
)

_LONGEST = 420  # characters of the whole line
_PATHS, _FUNCTIONS, _ADDED, _REMOVED = 5, 4, 12, 8
_LINE_BYTES = 1 << 14  # of a line that are read: more than two paths have, less than a minified file
_NAMING_BYTES = 8 << 20  # of all lines together; of a longer diff only lines are counted from there on

_NAME = re.compile(rb"[A-Za-z_][A-Za-z0-9_]{3,31}")
# No boundary in front: so a typedef or a cdef says what it defines, as the public data set has it.
_FUNCTION = re.compile(rb"(?:class|def|func|function|fn)\s+([A-Za-z_][A-Za-z0-9_]+)")
_HUNK = re.compile(rb"(@@+) [^@]* @@+ ?(.*)")
_ESCAPE = re.compile(rb'\\([abtnvfr"\\]|[0-7]{3})')
_ESCAPED = dict(zip(b'abtnvfr"\\', b'\a\b\t\n\v\f\r"\\', strict=True))
# They say how code is written, not what it is about.
_COMMON = frozenset(
    b"self this class function return import from with else elif then when where which that lambda "
    b"assert except raise yield async await print None True False null true false undefined "
    b"const static public private struct void char bool string unsigned".split()
)


@dataclass
class _File:
    path: bytes
    added: int = 0
    removed: int = 0


class _Diff:
    """What was read so far."""

    def __init__(self) -> None:
        self.files: list[_File] = []
        self.functions: dict[bytes, None] = {}
        self.added: Counter[bytes] = Counter()
        self.removed: Counter[bytes] = Counter()
        self._signs = 0  # columns in front of a line: one for each parent; 0 outside hunks
        self._left = _NAMING_BYTES

    def read(self, line: bytes) -> None:
        if line.startswith(b"diff --"):
            self._signs = 0
            self.files.append(_File(_path_of_header(line)))
        elif line.startswith(b"@@"):
            self._read_hunk_header(line)
        elif self._signs:
            self._read_change(line)
        elif line.startswith((b"rename to ", b"copy to ")):
            self.files[-1].path = _unquoted(line.partition(b" to ")[2])

    def _read_hunk_header(self, line: bytes) -> None:
        if found := _HUNK.match(line):
            self._signs = len(found[1]) - 1
            if function := _FUNCTION.search(found[2]):
                self.functions[function[1]] = None

    def _read_change(self, line: bytes) -> None:
        signs = line[: self._signs]
        is_added, is_removed = b"+" in signs, b"-" in signs
        if not is_added and not is_removed:
            return
        self.files[-1].added += not is_removed
        self.files[-1].removed += is_removed
        text = line[self._signs : self._signs + self._left]
        self._left -= len(text)
        names = self.removed if is_removed else self.added
        names.update(name for name in _NAME.findall(text) if name not in _COMMON)


def changes_of_diff(diff: bytes | str | BinaryIO) -> str:
    """The line for what git printed with DIFF_OPTIONS, whole or as it comes; "" where nothing changed."""
    if isinstance(diff, str):
        diff = diff.encode(errors="surrogateescape")
    found = _Diff()
    for line in _lines(io.BytesIO(diff) if isinstance(diff, bytes) else diff):
        found.read(line)
    paths = [f"{_text(file.path)} +{file.added} -{file.removed}" for file in found.files]
    if len(paths) > _PATHS:
        paths[_PATHS:] = [f"{len(paths) - _PATHS} more"]
    parts = ["; ".join(paths)]
    for word, names in (
        ("in", list(found.functions)[:_FUNCTIONS]),
        ("adds", _most(found.added - found.removed, _ADDED)),
        ("removes", _most(found.removed - found.added, _REMOVED)),
    ):
        if names:
            parts.append(f"{word} {', '.join(name.decode() for name in names)}")
    return " | ".join(parts)[:_LONGEST].strip()


def _lines(diff: BinaryIO) -> Iterator[bytes]:
    """Each line, or its front."""
    is_front = True
    while line := diff.readline(_LINE_BYTES):
        if is_front:
            yield line
        is_front = line.endswith(b"\n")


def _most(names: Counter[bytes], count: int) -> list[bytes]:
    """Of equally frequent ones those that came first."""
    return [name for name, _ in names.most_common(count)]


def _path_of_header(line: bytes) -> bytes:
    """Of `diff --git a/PATH b/PATH` (both are equal, or a rename follows), or `diff --cc PATH` of a merge."""
    kind, _, rest = line.rstrip(b"\n").removeprefix(b"diff --").partition(b" ")
    if kind != b"git":
        return _unquoted(rest)
    return _unquoted(rest[len(rest) // 2 + 1 :]).removeprefix(b"b/")


def _unquoted(path: bytes) -> bytes:
    """Git quotes what is no plain ASCII as C does."""
    path = path.rstrip(b"\r\n")
    if not path.startswith(b'"'):
        return path
    return _ESCAPE.sub(lambda found: bytes([_byte(found[1])]), path[1:-1])


def _byte(escape: bytes) -> int:
    return _ESCAPED[escape[0]] if len(escape) == 1 else int(escape, 8) & 0xFF


def _text(path: bytes) -> str:
    return one_line(path.decode(errors="replace"))
