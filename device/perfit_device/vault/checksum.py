"""A digest of the vault's whole file, kept beside it, for the bytes that no row's seal covers.

Rows and header are authenticated inside the vault. Free pages and page headers are not, and a
flipped bit there still means that a disk or somebody changed the file. `vault.db.sum` holds
SQLite's change counter and the sha-256 of the file as the last process left it. It counts only
while its counter equals the file's, so a crash between a commit and this note loses just the note.

The vault holds the file open as long as its connection: closing it drops every POSIX lock that this
process has on the file.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path
from typing import BinaryIO

from perfit_shared.errors import VaultDamaged

__all__ = ["check", "write"]

_COUNTER = slice(24, 28)  # SQLite's file change counter
_PART = 1 << 18  # bytes that are read at once
_VALID_FOR = slice(92, 96)  # the counter's value when the page count was written: always the same here


def check(file: BinaryIO, path: Path, *, is_swept: bool) -> bool:
    """Whether the note is up to date. Raises VaultDamaged when it is, and the file differs.

    A file that is not swept may be longer than what is in it: SQLite has made a smaller one out of it
    when it cuts off the rest, and a kill may come in between.
    """
    head, size = _head(file)
    damaged = VaultDamaged(
        f"{path} was changed outside of its rows; restore a copy, or remove {_note(path)} to go on "
        "with the rows, which are checked one by one"
    )
    actual = os.fstat(file.fileno()).st_size
    if actual < size or (actual > size and is_swept) or head[_COUNTER] != head[_VALID_FOR]:
        raise damaged
    try:
        note = _note(path).read_bytes()
    except OSError:
        return False
    counter, digest, proof = note[:4], note[4:36], note[36:]
    if proof != _proof(note[:36]) or counter != head[_COUNTER]:
        return False
    if digest != _digest(file, size):
        raise damaged
    return True


def write(file: BinaryIO, path: Path) -> None:
    """Note the file as it is now. A failure is harmless: an outdated note is ignored."""
    new = path.with_name(f"{path.name}.sum.new")  # a leftover of a kill at most: we hold the vault
    try:
        head, size = _head(file)
        body = head[_COUNTER] + _digest(file, size)
        new.unlink(missing_ok=True)
        with os.fdopen(os.open(new, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as note:
            note.write(body + _proof(body))
        new.replace(_note(path))
    except OSError:
        with contextlib.suppress(OSError):
            new.unlink(missing_ok=True)


def _note(path: Path) -> Path:
    return path.with_name(path.name + ".sum")


def _proof(body: bytes) -> bytes:
    return hashlib.sha256(b"perfit vault note" + body).digest()[:8]


def _head(file: BinaryIO) -> tuple[bytes, int]:
    """SQLite's header, and how many bytes are in use by it (its file format, 1.3.2 and 1.3.8)."""
    file.seek(0)
    head = file.read(100)
    page_bytes = int.from_bytes(head[16:18], "big")
    return head, (65536 if page_bytes == 1 else page_bytes) * int.from_bytes(head[28:32], "big")


def _digest(file: BinaryIO, size: int) -> bytes:
    """Of the first `size` bytes. A part at a time: the file holds ten versions of a shift."""
    digest = hashlib.sha256()
    file.seek(0)
    while size > 0 and (part := file.read(min(_PART, size))):
        digest.update(part)
        size -= len(part)
    return digest.digest()
