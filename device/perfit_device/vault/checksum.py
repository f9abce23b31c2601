"""A digest of the vault's whole file, kept beside it, for the bytes that no row's seal covers.

Rows and header are authenticated inside the vault. Free pages and page headers are not, and a
flipped bit there still means that a disk or somebody changed the file. `vault.db.sum` holds
SQLite's change counter and the sha-256 of the file as the last process left it. It speaks only
where its counter is the file's, so a crash between a commit and this note costs the note alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sqlite3
from pathlib import Path

from perfit_shared.errors import VaultDamaged

__all__ = ["check", "write"]

_COUNTER = slice(24, 28)  # SQLite's file change counter
_VALID_FOR = slice(92, 96)  # the counter's value when the page count was written: always the same here


def check(connection: sqlite3.Connection, path: Path, *, is_swept: bool) -> bool:
    """Whether the note is up to date. Raises VaultDamaged when it is, and the file differs.

    A file that is not swept may be longer than what is in it: SQLite has made a smaller one out of it
    when it cuts off the rest, and a kill may come in between.

    Reads through `connection`, which holds the lock: closing a file handle of our own would drop
    every POSIX lock that this process has on the file.
    """
    image = connection.serialize()
    damaged = VaultDamaged(
        f"{path} was changed outside of its rows; restore a copy, or remove {_note(path)} to go on "
        "with the rows, which are checked one by one"
    )
    size = path.stat().st_size
    if size < len(image) or (size > len(image) and is_swept) or image[_COUNTER] != image[_VALID_FOR]:
        raise damaged
    try:
        note = _note(path).read_bytes()
    except OSError:
        return False
    counter, digest, proof = note[:4], note[4:36], note[36:]
    if proof != _proof(note[:36]) or counter != image[_COUNTER]:
        return False
    if digest != hashlib.sha256(image).digest():
        raise damaged
    return True


def write(connection: sqlite3.Connection, path: Path) -> None:
    """Note the file as it is now. Failing is no harm: an old note says nothing."""
    image = connection.serialize()
    body = image[_COUNTER] + hashlib.sha256(image).digest()
    new = path.with_name(f"{path.name}.sum.new")  # left by a kill, or nobody's: we hold the vault
    try:
        new.unlink(missing_ok=True)
        with os.fdopen(os.open(new, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as file:
            file.write(body + _proof(body))
        new.replace(_note(path))
    except OSError:
        with contextlib.suppress(OSError):
            new.unlink(missing_ok=True)


def _note(path: Path) -> Path:
    return path.with_name(path.name + ".sum")


def _proof(body: bytes) -> bytes:
    return hashlib.sha256(b"perfit vault note" + body).digest()[:8]
