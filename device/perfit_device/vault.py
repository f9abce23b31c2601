"""The device's sealed store: one SQLite file of rows that only its owner's passphrase opens.

    header(data, list_mac)                             sealing.Header, MAC over the list of rows
    rows(kind, id, version, wrapped_key, sealed)       sealing.DataKey

Promises: a crash at any byte leaves the old or the new version (journal_mode=DELETE,
synchronous=FULL, one transaction a change); every row is bound to its place and the list of rows
to the key, so a changed, swapped, dropped or revived row is VaultDamaged on opening; nothing of a
deleted or replaced row stays in the file; two processes never hold one vault at once.

`secure_delete` alone does not keep the last but one: moving rows between pages leaves copies of
them in the free space of pages (measured). So a change that removes bytes marks the file in the
same transaction (`user_version`), and it is rebuilt by VACUUM right after, or on the next opening.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from perfit_device import filesum
from perfit_device.sealing import DataKey, Header, KdfParams
from perfit_shared.errors import NotFound, VaultBusy, VaultDamaged, VaultError, VaultUnswept

__all__ = ["Vault"]

_APPLICATION_ID = 0x50465431  # "PFT1"
_UNSWEPT = 1  # user_version while the file may hold copies of removed rows
_WAIT_SECONDS = 5.0  # for another process that is just finishing
_SCHEMA = """
CREATE TABLE header (one INTEGER PRIMARY KEY CHECK (one = 1), data BLOB NOT NULL, list_mac BLOB NOT NULL);
CREATE TABLE rows (
    kind TEXT NOT NULL, id BLOB NOT NULL, version INTEGER NOT NULL,
    wrapped_key BLOB NOT NULL, sealed BLOB NOT NULL, PRIMARY KEY (kind, id)
) WITHOUT ROWID;
"""
_Place = tuple[str, bytes]  # kind, row id
Rows = list[tuple[Any, ...]]  # `list` means something else inside Vault


class Vault:
    """An open vault; `create` or `open` one, and close it or use `with`."""

    def __init__(self, path: Path, connection: sqlite3.Connection, header: Header, key: bytes) -> None:
        self.path = path
        self.closed = False
        self._connection = connection
        self._header = header
        self._raw_key = key
        self._key = DataKey(key, header.vault_id)
        self._listed: dict[_Place, tuple[int, bytes]] = {}  # → version, digest of wrapped key and row
        self._depth = 0
        self._removed = False  # whether the transaction at hand removes bytes
        self._noted = False  # whether filesum's note is up to date

    # -- opening and closing -------------------------------------------------------------------

    @classmethod
    def create(cls, path: Path, passphrase: str | None, *, kdf: KdfParams | None = None) -> Vault:
        """A new vault, locked by `passphrase`, or by the OS keyring when it is None.

        Raises VaultError when there is one already. It appears at `path` only when it is whole.
        """
        if path.exists():
            raise VaultError(f"there is a vault at {path} already")
        _make_private_folder(path.parent)
        key = secrets.token_bytes(32)
        header = Header.create(key, passphrase, kdf or KdfParams())
        new = path.with_name(f"{path.name}.{secrets.token_hex(4)}.new")
        try:
            os.close(os.open(new, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
            with _translated(path), contextlib.closing(_connect(new)) as connection:
                connection.executescript(f"PRAGMA application_id={_APPLICATION_ID};{_SCHEMA}")
                mac = DataKey(key, header.vault_id).list_mac(b"")
                connection.execute("INSERT INTO header VALUES (1, ?, ?)", (header.to_bytes(), mac))
            os.link(new, path)  # unlike a rename, this never replaces a vault made meanwhile
        except FileExistsError as error:
            raise VaultError(f"there is a vault at {path} already") from error
        except OSError as error:
            raise VaultError(f"cannot write {path}: {error.strerror}") from error
        finally:
            new.unlink(missing_ok=True)
        _sync_folder(path.parent)
        return cls._open(path, key=key, passphrase=None, wait_seconds=_WAIT_SECONDS)

    @classmethod
    def open(cls, path: Path, passphrase: str | None, *, wait_seconds: float = _WAIT_SECONDS) -> Vault:
        """Raises NotFound, VaultBusy, WrongPassphrase or VaultDamaged; none of them changes a byte."""
        return cls._open(path, key=None, passphrase=passphrase, wait_seconds=wait_seconds)

    @staticmethod
    def lock_of(path: Path) -> str:
        """ "passphrase" or "keyring", without opening. Raises as `open` does."""
        connection, header = _attach(path, _WAIT_SECONDS)
        connection.close()
        return header.lock

    @classmethod
    def _open(cls, path: Path, *, key: bytes | None, passphrase: str | None, wait_seconds: float) -> Vault:
        connection, header = _attach(path, wait_seconds)
        try:
            vault = cls(path, connection, header, key or header.unwrap(passphrase))
            with _translated(path):
                vault._verify()
                vault._noted = filesum.check(connection, path)
                if connection.execute("PRAGMA user_version").fetchone()[0] == _UNSWEPT:
                    with contextlib.suppress(VaultUnswept):  # a full disk is no reason not to open
                        vault._sweep()
        except BaseException:
            connection.close()
            raise
        return vault

    def close(self) -> None:
        """Release the file, with a note of how it was left."""
        if self.closed:
            return
        self.closed = True
        if not self._noted:
            with contextlib.suppress(sqlite3.Error):
                filesum.write(self._connection, self.path)
        self._connection.close()

    def __enter__(self) -> Vault:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- rows ----------------------------------------------------------------------------------

    def get(self, kind: str, name: str) -> bytes | None:
        """The row's bytes, or None."""
        place = (kind, self._key.row_id(kind, name))
        if place not in self._listed:
            return None
        rows = self._execute(
            "SELECT version, wrapped_key, sealed FROM rows WHERE kind = ? AND id = ?", *place
        )
        if not rows:
            raise VaultDamaged("a row of the vault is gone; restore a copy of the file")
        return _unpack(self._key.unseal(*place, *rows[0]))[1]

    def has(self, kind: str, name: str) -> bool:
        return (kind, self._key.row_id(kind, name)) in self._listed

    def list(self, kind: str) -> dict[str, bytes]:
        """Every row of a kind: name → bytes, in no order that means anything."""
        rows = self._execute("SELECT id, version, wrapped_key, sealed FROM rows WHERE kind = ?", kind)
        return dict(_unpack(self._key.unseal(kind, *row)) for row in rows)

    def put(self, kind: str, name: str, data: bytes) -> None:
        """Write a row, as its next version if it is there. Atomic, by itself or in a transaction."""
        place = (kind, self._key.row_id(kind, name))
        version = self._listed.get(place, (0, b""))[0] + 1
        wrapped, sealed = self._key.seal(*place, version, _pack(name, data))
        del data  # megabytes, of which SQLite makes copies
        digest = _row_digest(wrapped, sealed)
        with self.transaction():
            self._execute(
                "INSERT OR REPLACE INTO rows VALUES (?, ?, ?, ?, ?)", *place, version, wrapped, sealed
            )
            del sealed
            self._removed = self._removed or version > 1
            self._listed[place] = (version, digest)

    def delete(self, kind: str, name: str) -> bool:
        """Remove a row and its key for good; whether it was there."""
        place = (kind, self._key.row_id(kind, name))
        if place not in self._listed:
            return False
        with self.transaction():
            self._execute("DELETE FROM rows WHERE kind = ? AND id = ?", *place)
            self._removed = True
            del self._listed[place]
        return True

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """All of the changes inside, or none. Nested ones belong to the outermost."""
        if self._depth:
            yield
            return
        before = dict(self._listed)
        self._depth += 1
        self._removed = False
        try:
            self._execute("BEGIN IMMEDIATE")
            self._noted = False
            yield
            self._execute("UPDATE header SET list_mac = ?", self._key.list_mac(self._list_bytes()))
            if self._removed:
                self._execute(f"PRAGMA user_version={_UNSWEPT}")
            self._execute("COMMIT")
        except BaseException:
            self._listed = before
            # A full disk makes SQLite roll back by itself.
            with contextlib.suppress(sqlite3.Error):
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
            raise
        finally:
            self._depth -= 1
        if self._removed:
            self._sweep()

    def _sweep(self) -> None:
        """Rebuild the file from what is in it. Where that fails it is tried again at the next change."""
        self._noted = False
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
        header = self._header.rewrap(self._raw_key, passphrase)
        with self.transaction():
            self._execute("UPDATE header SET data = ?", header.to_bytes())
            self._removed = True
        self._header = header

    def _execute(self, sql: str, *values: str | bytes | int) -> Rows:
        with _translated(self.path):
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
            if types != (str, bytes, int, bytes, bytes):
                raise damaged
            self._listed[kind, row_id] = (version, _row_digest(wrapped, sealed))
        (mac,) = self._connection.execute("SELECT list_mac FROM header").fetchone()
        if not isinstance(mac, bytes) or not secrets.compare_digest(
            mac, self._key.list_mac(self._list_bytes())
        ):
            raise damaged


def _attach(path: Path, wait_seconds: float) -> tuple[sqlite3.Connection, Header]:
    """Lock the file for this process and read its header."""
    if not path.is_file():
        raise NotFound(f"there is no vault at {path}; `perfit enroll INVITE` makes one")
    with _translated(path):
        connection = _connect(path, wait_seconds)
        try:
            damaged = VaultDamaged(f"{path} is not a whole vault; restore a copy of the file")
            # Before the lock, which would turn an empty file into an empty database.
            if connection.execute("PRAGMA application_id").fetchone()[0] != _APPLICATION_ID:
                raise damaged
            connection.execute("PRAGMA locking_mode=EXCLUSIVE")
            connection.execute("BEGIN EXCLUSIVE")  # also rolls back what a crash left half-done
            connection.execute("COMMIT")
            rows = connection.execute("SELECT data FROM header LIMIT 2").fetchall()
            if len(rows) != 1 or not isinstance(rows[0][0], bytes):
                raise damaged
            return connection, Header.from_bytes(rows[0][0])
        except BaseException:
            connection.close()
            raise


def _connect(path: Path, wait_seconds: float = _WAIT_SECONDS) -> sqlite3.Connection:
    # mode=rw: never make a file. isolation_level=None: transactions begin where we say so.
    # Used by one thread at a time, but not always by the one that opened it.
    # cached_statements=0: a statement kept for later keeps a copy of the row it wrote.
    connection = sqlite3.connect(
        f"{path.absolute().as_uri()}?mode=rw", uri=True, isolation_level=None, timeout=wait_seconds,
        check_same_thread=False, cached_statements=0,
    )  # fmt: skip
    try:
        for pragma in (
            "secure_delete=ON", "synchronous=FULL", "temp_store=MEMORY", "trusted_schema=OFF",
            "cache_size=-256",
        ):  # fmt: skip
            connection.execute(f"PRAGMA {pragma}")
    except BaseException:
        connection.close()
        raise
    return connection


@contextlib.contextmanager
def _translated(path: Path) -> Iterator[None]:
    """SQLite's errors as ours, by their codes."""
    try:
        yield
    except (UnicodeDecodeError, OverflowError) as error:  # a damaged schema, or text that is none
        raise VaultDamaged(f"{path} is damaged, and was left as it is; restore a copy of the file") from error
    except sqlite3.Error as error:
        name = getattr(error, "sqlite_errorname", "") or ""
        if name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
            raise VaultBusy(
                f"another perfit is using {path}; wait for it to finish, or use another --profile"
            ) from error
        if name.startswith("SQLITE_FULL"):
            raise VaultError(
                "the disk is full, so nothing was changed; free some space and try again"
            ) from error
        if name.startswith(("SQLITE_READONLY", "SQLITE_IOERR", "SQLITE_CANTOPEN", "SQLITE_PERM")):
            raise VaultError(f"cannot use {path}: {error}; nothing was changed") from error
        raise VaultDamaged(f"{path} is damaged, and was left as it is; restore a copy of the file") from error


def _pack(name: str, data: bytes) -> bytes:
    encoded = name.encode()
    return len(encoded).to_bytes(4, "big") + encoded + data


def _unpack(plain: bytes) -> tuple[str, bytes]:
    size = int.from_bytes(plain[:4], "big")
    return plain[4 : 4 + size].decode(), plain[4 + size :]


def _row_digest(wrapped: bytes, sealed: bytes) -> bytes:
    return hashlib.sha256(wrapped + sealed).digest()


def _make_private_folder(folder: Path) -> None:
    """Make what is missing of the way to `folder`, for its owner's eyes only."""
    missing = [part for part in (folder, *folder.parents) if not part.exists()]
    try:
        for part in reversed(missing):
            part.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise VaultError(f"cannot make {folder}: {error.strerror}") from error


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
