"""The rows of an open vault: read, written and removed, each sealed, in transactions that all hold or none.

`secure_delete` alone does not keep the promise that nothing of a removed row stays: moving rows between pages
leaves copies of them in the free space of pages (measured). So a change that removes bytes marks the file in
the same transaction (`user_version`), and it is rebuilt by VACUUM right after, or on the next opening. A put
may leave that to the next change that removes, or to the vault's `close`: VACUUM copies the whole file.
"""

from __future__ import annotations

import contextlib
import hmac
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from perfit_device.vault.crypto import DataKey
from perfit_device.vault.file import translated
from perfit_device.vault.rows import digest_of, pack, unpack
from perfit_shared.errors import VaultDamaged, VaultError, VaultUnswept

__all__ = ["RESERVE", "SealedRows"]

RESERVE = ("reserve", "")  # kind and name of the row that `reserve` writes
_UNSWEPT = 1  # user_version while the file may hold copies of removed rows
_RowRef = tuple[str, bytes]  # kind, row id
Rows = list[tuple[Any, ...]]  # `list` means something else inside SealedRows
Names = list[str]


class SealedRows:
    """Those of one file, behind one connection. Thread-safe."""

    def __init__(self, path: Path, connection: sqlite3.Connection, key: DataKey) -> None:
        self.path = path
        self._connection = connection
        self._key = key
        self._listed: dict[_RowRef, tuple[int, bytes]] = {}  # → version, digest of wrapped key and row
        self._lock = threading.RLock()
        self._depth = 0
        self._removed = False  # whether the transaction at hand removes bytes
        self._sweeps = False  # whether they are to be swept right after it
        self._checksum_current = False  # whether the checksum beside the file is up to date

    def get(self, kind: str, name: str) -> bytes | None:
        """The row's bytes, or None."""
        ref = (kind, self._key.row_id(kind, name))
        with self._lock:
            if ref not in self._listed:
                return None
            rows = self._execute(
                "SELECT version, wrapped_key, sealed FROM rows WHERE kind = ? AND id = ?", *ref
            )
        if not rows:
            raise VaultDamaged("a row of the vault is gone; restore a copy of the file")
        return unpack(self._key.unseal(*ref, *rows[0]))[1]

    def has(self, kind: str, name: str) -> bool:
        with self._lock:
            return (kind, self._key.row_id(kind, name)) in self._listed

    def digest(self, kind: str, name: str) -> bytes | None:
        """Of the row as it is sealed, None where there is none: every put gives it another one.

        It waits for no transaction, and tells of one before that is over.
        """
        return self._listed.get((kind, self._key.row_id(kind, name)), (0, None))[1]

    def count(self, kind: str) -> int:
        """How many rows of a kind there are."""
        with self._lock:
            return sum(of == kind for of, _ in self._listed)

    def list(self, kind: str) -> dict[str, bytes]:
        """Every row of a kind: name → bytes, in no order that means anything."""
        with self._lock:
            rows = self._execute("SELECT id, version, wrapped_key, sealed FROM rows WHERE kind = ?", kind)
        return dict(unpack(self._key.unseal(kind, *row)) for row in rows)

    def names(self, kind: str) -> Names:
        """The names of the rows of a kind, sorted. It holds one row at a time."""
        with self._lock:
            refs = self._execute("SELECT id FROM rows WHERE kind = ?", kind)
            return sorted(self._name(kind, row_id) for (row_id,) in refs)

    def _name(self, kind: str, row_id: bytes) -> str:
        row = self._execute(
            "SELECT version, wrapped_key, sealed FROM rows WHERE kind = ? AND id = ?", kind, row_id
        )
        return unpack(self._key.unseal(kind, row_id, *row[0]))[0]

    def put(self, kind: str, name: str, data: bytes, *, sweep: bool = True) -> None:
        """Write a row, as its next version if it is there. Atomic, by itself or in a transaction.

        Without `sweep` parts of the version before may stay until the next sweep, at the latest in `close`.
        """
        ref = (kind, self._key.row_id(kind, name))
        with self._lock:
            version = self._listed.get(ref, (0, b""))[0] + 1
            wrapped, sealed = self._key.seal(*ref, version, pack(name, data))
            del data  # megabytes; SQLite makes copies
            digest = digest_of(wrapped, sealed)
            with self.transaction():
                self._execute(
                    "INSERT OR REPLACE INTO rows VALUES (?, ?, ?, ?, ?)", *ref, version, wrapped, sealed
                )
                del sealed
                self._removed = self._removed or version > 1
                self._sweeps = self._sweeps or (sweep and version > 1)
                self._listed[ref] = (version, digest)

    def kinds(self) -> set[str]:
        """Of the rows that are there."""
        with self._lock:
            return {kind for kind, _ in self._listed}

    def delete(self, kind: str, name: str) -> bool:
        """Remove a row and its key for good; whether it was there."""
        ref = (kind, self._key.row_id(kind, name))
        with self._lock:
            if ref not in self._listed:
                return False
            with self.transaction():
                self._execute("DELETE FROM rows WHERE kind = ? AND id = ?", *ref)
                self._removed = self._sweeps = True
                del self._listed[ref]
            return True

    def reserve(self, size: int) -> None:
        """Find out whether `size` bytes more can be written now, and leave the vault as it was.

        Raises VaultError when the disk is too full for them, or the file cannot be written.
        """
        try:
            self.put(*RESERVE, bytes(size))
            self.delete(*RESERVE)
        except VaultUnswept as error:
            raise VaultError(
                f"the disk has no room for the {size >> 10} KiB that this takes, twice; free some space"
            ) from error

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """All of the changes inside, or none. Nested ones belong to the outermost; other threads wait."""
        with self._lock:
            if self._depth:
                yield
                return
            with self._outermost():
                yield

    @contextlib.contextmanager
    def _outermost(self) -> Iterator[None]:
        before = dict(self._listed)
        self._depth += 1
        self._removed = self._sweeps = False
        try:
            self._execute("BEGIN IMMEDIATE")
            self._checksum_current = False
            yield
            self._execute("UPDATE header SET list_mac = ?", self._key.list_mac(self._list_bytes()))
            if self._removed:
                self._execute(f"PRAGMA user_version={_UNSWEPT}")
            self._execute("COMMIT")
        except BaseException:
            self._roll_back(before)
            raise
        finally:
            self._depth -= 1
        if self._sweeps:
            self._sweep()

    def _roll_back(self, before: dict[_RowRef, tuple[int, bytes]]) -> None:
        """To the list of rows as it was; unless Ctrl-C came when the change was made already."""
        with contextlib.suppress(sqlite3.Error):
            # A full disk makes SQLite roll back by itself.
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            if self._has_list(self._list_bytes()):
                return
        self._listed = before

    def _is_swept(self) -> bool:
        return bool(self._execute("PRAGMA user_version")[0][0] != _UNSWEPT)

    def _sweep(self) -> None:
        """Rebuild the file from what is in it. Where that fails it is tried again at the next change."""
        self._checksum_current = False
        try:
            self._execute("VACUUM")
            self._execute("PRAGMA user_version=0")
        except VaultDamaged:
            raise
        except VaultError as error:
            raise VaultUnswept(
                "the change is made, but what it removed could not be overwritten yet; free some disk "
                "space, and the next perfit command does it"
            ) from error

    def _execute(self, sql: str, *values: str | bytes | int) -> Rows:
        with translated(self.path):
            return self._connection.execute(sql, values).fetchall()

    # -- the list of rows ----------------------------------------------------------------------

    def _list_bytes(self) -> bytes:
        return b"".join(
            f"{kind}\0{row_id.hex()}\0{version}\0{digest.hex()}\n".encode()
            for (kind, row_id), (version, digest) in sorted(self._listed.items())
        )

    def _verify(self) -> None:
        """Fill the list of rows from the file, and check it and the file's structure."""
        damaged = VaultDamaged("the vault was changed or lost a part; restore a copy of the file")
        if self._connection.execute("PRAGMA integrity_check(1)").fetchone() != ("ok",):
            raise damaged
        for row in self._connection.execute("SELECT kind, id, version, wrapped_key, sealed FROM rows"):
            kind, row_id, version, wrapped, sealed = row
            types = tuple(type(value) for value in row)
            # A kind with line breaks of its own could stand for several lines of the list.
            if types != (str, bytes, int, bytes, bytes) or not kind.isidentifier():
                raise damaged
            self._listed[kind, row_id] = (version, digest_of(wrapped, sealed))
        if not self._has_list(self._list_bytes()):
            raise damaged

    def _has_list(self, rows: bytes) -> bool:
        """Whether this is the list of rows that the file vouches for."""
        mac: object = self._connection.execute("SELECT list_mac FROM header").fetchone()[0]
        return isinstance(mac, bytes) and bool(hmac.compare_digest(mac, self._key.list_mac(rows)))
