"""The device's sealed store: one SQLite file of rows that only its owner's passphrase opens.

    header(data, list_mac)                             crypto.Header, MAC over the list of rows
    rows(kind, id, version, wrapped_key, sealed)       crypto.DataKey

Promises: a crash at any byte leaves the old or the new version (a rollback journal, synchronous=FULL,
one transaction a change); every row is bound to its kind and id, and the list of rows to the key, so a
changed, swapped, dropped or revived row is VaultDamaged on opening; nothing of a deleted or replaced
row stays in the file or its journal; two processes never hold one vault at once. A whole file of an
earlier day, put back, is not noticed.

`secure_delete` alone does not keep the last but one: moving rows between pages leaves copies of
them in the free space of pages (measured). So a change that removes bytes marks the file in the
same transaction (`user_version`), and it is rebuilt by VACUUM right after, or on the next opening.
A put may leave that to the next change that removes, or to `close`: VACUUM copies the whole file.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import sqlite3
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from perfit_device.migration import migrate
from perfit_device.vault import checksum
from perfit_device.vault.crypto import COSTLIEST, FORMAT, DataKey, Header, KdfParams, new_key
from perfit_device.vault.file import WAIT_SECONDS, attach, lock_in_process, make, translated
from perfit_shared.errors import VaultDamaged, VaultError, VaultUnswept

__all__ = ["Vault"]

_OUR_KDF = KdfParams()  # what `create` locks by
_RESERVE = ("reserve", "")  # kind and name of the row that `reserve` writes
_UNSWEPT = 1  # user_version while the file may hold copies of removed rows
_RowRef = tuple[str, bytes]  # kind, row id
Rows = list[tuple[Any, ...]]  # `list` means something else inside Vault


class Vault:
    """An open vault; `create` or `open` one, and close it or use `with`. Several threads may share it."""

    def __init__(self, path: Path, connection: sqlite3.Connection, header: Header, key: bytearray) -> None:
        self.path = path
        self.closed = False
        self._connection = connection
        self._file = path.open("rb", buffering=0)  # for the checksum
        self._header = header
        self._key = DataKey(key, header.vault_id)
        self._listed: dict[_RowRef, tuple[int, bytes]] = {}  # → version, digest of wrapped key and row
        self._lock = threading.RLock()
        self._depth = 0
        self._removed = False  # whether the transaction at hand removes bytes
        self._sweeps = False  # whether they are to be swept right after it
        self._unlock: Callable[[], object] | None = None  # lets another thread open the file
        self._checksum_current = False  # whether the checksum beside the file is up to date

    # -- opening and closing -------------------------------------------------------------------

    @classmethod
    def create(cls, path: Path, passphrase: str | None, *, kdf: KdfParams | None = None) -> Vault:
        """A new vault, locked by `passphrase`, or by the OS keyring when it is None.

        Raises VaultError when there is one already. It appears at `path` only when it is whole.
        """
        if path.exists():
            raise VaultError(f"there is a vault at {path} already")
        key = new_key()
        header = Header.create(key, passphrase, kdf or KdfParams())
        make(path, header, DataKey(key, header.vault_id).list_mac(b""))
        return cls._open(path, key=key, passphrase=None, wait_seconds=WAIT_SECONDS, most=header.kdf)

    @classmethod
    def open(
        cls, path: Path, passphrase: str | None, *, wait_seconds: float = WAIT_SECONDS, costly: bool = False
    ) -> Vault:
        """Raises NotFound, VaultBusy, WrongPassphrase or VaultDamaged; none of them changes a byte.

        A vault of an earlier format becomes one of today's, whole or not at all. VaultError where the disk
        does not take that, and where the key derivation costs more than that of `create` and `costly` does
        not allow it.
        """
        return cls._open(
            path, key=None, passphrase=passphrase, wait_seconds=wait_seconds, most=_most(costly=costly)
        )

    @staticmethod
    def lock_of(path: Path, *, costly: bool = False) -> str:
        """ "passphrase" or "keyring", without opening. Raises as `open` does."""
        lock = lock_in_process(path, WAIT_SECONDS)
        try:
            connection, header = attach(path, WAIT_SECONDS, _most(costly=costly))
            connection.close()
        finally:
            lock.release()
        return header.lock

    @classmethod
    def _open(
        cls,
        path: Path,
        *,
        key: bytearray | None,
        passphrase: str | None,
        wait_seconds: float,
        most: KdfParams,
    ) -> Vault:
        lock = lock_in_process(path, wait_seconds)
        try:
            connection, header = attach(path, wait_seconds, most)
            try:
                vault = cls(path, connection, header, key or header.unwrap(passphrase))
            except BaseException:
                connection.close()
                raise
        except BaseException:
            lock.release()
            raise
        vault._unlock = weakref.finalize(vault, lock.release)
        try:
            with translated(path):
                vault._verify()
                is_swept = vault._is_swept()
                vault._checksum_current = checksum.check(vault._file, path, is_swept=is_swept)
                vault._clean_up(is_swept=is_swept)
                vault._migrate(passphrase)
        except BaseException:
            vault._release()
            raise
        return vault

    def _clean_up(self, *, is_swept: bool) -> None:
        """Remove what a kill left behind. Where the disk takes no change, another opening does it."""
        try:
            if not self.delete(*_RESERVE) and not is_swept:
                self._sweep()
        except VaultDamaged:
            raise
        except VaultError:
            return

    def _migrate(self, passphrase: str | None) -> None:
        """Bring a vault of an earlier format to today's, rows and header in one transaction."""
        if self._header.format == FORMAT:
            return
        header = self._key.in_todays_format(self._header, passphrase)
        with contextlib.suppress(VaultUnswept), self.transaction():  # another opening sweeps it
            migrate(self, self._header.format)
            self._write_header(header)

    def close(self) -> None:
        """Write the checksum and release the file."""
        if self.closed:
            return
        self.closed = True
        try:
            with contextlib.suppress(sqlite3.Error, VaultError):
                if not self._is_swept():
                    self._sweep()
                # Not for an unswept file: after a crash SQLite restores all but its free pages.
                if not self._checksum_current and self._is_swept():
                    checksum.write(self._file, self.path)
        finally:
            self._release()

    def _release(self) -> None:
        self._connection.close()
        self._file.close()
        self._key.wipe()
        if self._unlock is not None:
            self._unlock()  # behind the last handle of the file

    def __enter__(self) -> Vault:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- rows ----------------------------------------------------------------------------------

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
        return _unpack(self._key.unseal(*ref, *rows[0]))[1]

    def has(self, kind: str, name: str) -> bool:
        with self._lock:
            return (kind, self._key.row_id(kind, name)) in self._listed

    def list(self, kind: str) -> dict[str, bytes]:
        """Every row of a kind: name → bytes, in no order that means anything."""
        with self._lock:
            rows = self._execute("SELECT id, version, wrapped_key, sealed FROM rows WHERE kind = ?", kind)
        return dict(_unpack(self._key.unseal(kind, *row)) for row in rows)

    def put(self, kind: str, name: str, data: bytes, *, sweep: bool = True) -> None:
        """Write a row, as its next version if it is there. Atomic, by itself or in a transaction.

        Without `sweep` parts of the version before may stay until the next sweep, at the latest in `close`.
        """
        ref = (kind, self._key.row_id(kind, name))
        with self._lock:
            version = self._listed.get(ref, (0, b""))[0] + 1
            wrapped, sealed = self._key.seal(*ref, version, _pack(name, data))
            del data  # megabytes; SQLite makes copies
            digest = _row_digest(wrapped, sealed)
            with self.transaction():
                self._execute(
                    "INSERT OR REPLACE INTO rows VALUES (?, ?, ?, ?, ?)", *ref, version, wrapped, sealed
                )
                del sealed
                self._removed = self._removed or version > 1
                self._sweeps = self._sweeps or (sweep and version > 1)
                self._listed[ref] = (version, digest)

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
            self.put(*_RESERVE, bytes(size))
            self.delete(*_RESERVE)
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

    def change_passphrase(self, passphrase: str) -> None:
        """Rewrap the data key; no row is touched. A keyring vault becomes a passphrase vault."""
        self._write_header(self._key.rewrap(self._header, passphrase))

    def _write_header(self, header: Header) -> None:
        with self.transaction():
            self._execute("UPDATE header SET data = ?", header.to_bytes())
            self._removed = self._sweeps = True
        self._header = header

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
            self._listed[kind, row_id] = (version, _row_digest(wrapped, sealed))
        if not self._has_list(self._list_bytes()):
            raise damaged

    def _has_list(self, rows: bytes) -> bool:
        """Whether this is the list of rows that the file vouches for."""
        mac: object = self._connection.execute("SELECT list_mac FROM header").fetchone()[0]
        return isinstance(mac, bytes) and bool(hmac.compare_digest(mac, self._key.list_mac(rows)))


def _most(*, costly: bool) -> KdfParams:
    return COSTLIEST if costly else _OUR_KDF


def _pack(name: str, data: bytes) -> bytes:
    encoded = name.encode()
    return len(encoded).to_bytes(4, "big") + encoded + data


def _unpack(plain: bytes) -> tuple[str, bytes]:
    size = int.from_bytes(plain[:4], "big")
    return plain[4 : 4 + size].decode(), plain[4 + size :]


def _row_digest(wrapped: bytes, sealed: bytes) -> bytes:
    return hashlib.sha256(wrapped + sealed).digest()
