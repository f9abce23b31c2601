"""The device's sealed store: one SQLite file of rows that only its owner's passphrase opens.

    header(data, list_mac)                             sealing.Header, MAC over the list of rows
    rows(kind, id, version, wrapped_key, sealed)       sealing.DataKey

Promises: a crash at any byte leaves the old or the new version (journal_mode=DELETE,
synchronous=FULL, one transaction a change); every row is bound to its place and the list of rows
to the key, so a changed, swapped, dropped or revived row is VaultDamaged on opening; deleted rows
are overwritten (`secure_delete`); two processes never hold one vault at once.
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

from perfit_device.sealing import DataKey, Header, KdfParams
from perfit_shared.errors import NotFound, VaultBusy, VaultDamaged, VaultError

__all__ = ["Vault"]

_APPLICATION_ID = 0x50465431  # "PFT1"
_WAIT_SECONDS = 2.0  # for another process that is just finishing
_SCHEMA = """
CREATE TABLE header (one INTEGER PRIMARY KEY CHECK (one = 1), data BLOB NOT NULL, list_mac BLOB NOT NULL);
CREATE TABLE rows (
    kind TEXT NOT NULL, id BLOB NOT NULL, version INTEGER NOT NULL,
    wrapped_key BLOB NOT NULL, sealed BLOB NOT NULL, PRIMARY KEY (kind, id)
) WITHOUT ROWID;
"""
_Place = tuple[str, bytes]  # kind, row id


class Vault:
    """An open vault; `create` or `open` one, and close it or use `with`."""

    def __init__(self, path: Path, connection: sqlite3.Connection, header: Header, key: bytes) -> None:
        self.path = path
        self._connection = connection
        self._header = header
        self._raw_key = key
        self._key = DataKey(key, header.vault_id)
        self._listed: dict[_Place, tuple[int, bytes]] = {}  # → version, digest of wrapped key and row
        self._depth = 0

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
        except BaseException:
            connection.close()
            raise
        return vault

    def close(self) -> None:
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
        with _translated(self.path):
            row = self._connection.execute(
                "SELECT version, wrapped_key, sealed FROM rows WHERE kind = ? AND id = ?", place
            ).fetchone()
        if row is None:
            raise VaultDamaged("a row of the vault is gone; restore a copy of the file")
        return _unpack(self._key.unseal(*place, *row))[1]

    def list(self, kind: str) -> dict[str, bytes]:
        """Every row of a kind: name → bytes, in no order that means anything."""
        with _translated(self.path):
            rows = self._connection.execute(
                "SELECT id, version, wrapped_key, sealed FROM rows WHERE kind = ?", (kind,)
            ).fetchall()
        return dict(_unpack(self._key.unseal(kind, *row)) for row in rows)

    def put(self, kind: str, name: str, data: bytes) -> None:
        """Write a row, as its next version if it is there. Atomic, by itself or in a transaction."""
        place = (kind, self._key.row_id(kind, name))
        version = self._listed.get(place, (0, b""))[0] + 1
        wrapped, sealed = self._key.seal(*place, version, _pack(name, data))
        with self.transaction():
            self._connection.execute(
                "INSERT OR REPLACE INTO rows VALUES (?, ?, ?, ?, ?)", (*place, version, wrapped, sealed)
            )
            self._listed[place] = (version, _row_digest(wrapped, sealed))

    def delete(self, kind: str, name: str) -> bool:
        """Remove a row and its key for good; whether it was there."""
        place = (kind, self._key.row_id(kind, name))
        if place not in self._listed:
            return False
        with self.transaction():
            self._connection.execute("DELETE FROM rows WHERE kind = ? AND id = ?", place)
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
        try:
            with _translated(self.path):
                self._connection.execute("BEGIN IMMEDIATE")
                yield
                mac = self._key.list_mac(self._list_bytes())
                self._connection.execute("UPDATE header SET list_mac = ?", (mac,))
                self._connection.execute("COMMIT")
        except BaseException:
            self._listed = before
            # A full disk makes SQLite roll back by itself.
            with contextlib.suppress(sqlite3.Error):
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
            raise
        finally:
            self._depth -= 1

    def change_passphrase(self, passphrase: str) -> None:
        """Rewrap the data key; no row is touched. A keyring vault becomes a passphrase vault."""
        header = self._header.rewrap(self._raw_key, passphrase)
        with self.transaction():
            self._connection.execute("UPDATE header SET data = ?", (header.to_bytes(),))
        self._header = header

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
            connection.execute("PRAGMA locking_mode=EXCLUSIVE")
            connection.execute("BEGIN EXCLUSIVE")  # also rolls back what a crash left half-done
            connection.execute("COMMIT")
            application = connection.execute("PRAGMA application_id").fetchone()[0]
            rows = connection.execute("SELECT data FROM header LIMIT 2").fetchall()
            if application != _APPLICATION_ID or len(rows) != 1 or not isinstance(rows[0][0], bytes):
                raise VaultDamaged(f"{path} is not a whole vault; restore a copy of the file")
            return connection, Header.from_bytes(rows[0][0])
        except BaseException:
            connection.close()
            raise


def _connect(path: Path, wait_seconds: float = _WAIT_SECONDS) -> sqlite3.Connection:
    # mode=rw: never make a file. isolation_level=None: transactions begin where we say so.
    # Used by one thread at a time, but not always by the one that opened it.
    connection = sqlite3.connect(
        f"{path.absolute().as_uri()}?mode=rw", uri=True, isolation_level=None, timeout=wait_seconds,
        check_same_thread=False,
    )  # fmt: skip
    try:
        for pragma in ("secure_delete=ON", "synchronous=FULL", "temp_store=MEMORY", "trusted_schema=OFF"):
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
    except sqlite3.Error as error:
        name = getattr(error, "sqlite_errorname", "") or ""
        if name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
            raise VaultBusy(
                f"another perfit is using {path}; wait for it to finish, or use another --profile"
            ) from error
        if name.startswith("SQLITE_FULL"):
            raise VaultError("the disk is full, so nothing was changed; free some space and try again") from error
        if name.startswith(("SQLITE_READONLY", "SQLITE_IOERR", "SQLITE_CANTOPEN", "SQLITE_PERM")):
            raise VaultError(f"cannot use {path}: {error}; nothing was changed") from error
        raise VaultDamaged(
            f"{path} is damaged, and was left as it is; restore a copy of the file"
        ) from error


def _pack(name: str, data: bytes) -> bytes:
    encoded = name.encode()
    return len(encoded).to_bytes(4, "big") + encoded + data


def _unpack(plain: bytes) -> tuple[str, bytes]:
    size = int.from_bytes(plain[:4], "big")
    return plain[4 : 4 + size].decode(), plain[4 + size :]


def _row_digest(wrapped: bytes, sealed: bytes) -> bytes:
    return hashlib.sha256(wrapped + sealed).digest()


def _make_private_folder(folder: Path) -> None:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Parents follow the umask when made along the way; ours should not.
        for part in (folder, folder.parent, folder.parent.parent):
            if part.name in (folder.name, "profiles") and part.stat().st_uid == os.getuid():
                part.chmod(0o700)
    except OSError as error:
        raise VaultError(f"cannot make {folder}: {error.strerror}") from error


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
