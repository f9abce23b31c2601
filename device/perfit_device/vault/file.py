"""The vault's file as SQLite sees it: made whole, locked for one process, and refused when it is not ours.

Nothing here knows a key. `attach` reads the header and no row, and it takes the schema for what it must
be before anything else: a file may have been prepared by whoever could write it, and a trigger of theirs
would keep what the user forgets.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path

from perfit_device.vault.crypto import Header, KdfParams
from perfit_shared.errors import NotFound, VaultBusy, VaultDamaged, VaultError
from perfit_shared.files import sync_folder, temporary_name
from perfit_shared.ownership import check_ownership, make_private_folder

__all__ = ["WAIT_SECONDS", "attach", "make", "translated"]

WAIT_SECONDS = 5.0  # for another process that is just finishing
_APPLICATION_ID = 0x50465431  # "PFT1"
# Of formats 1 and 2, to the letter: SQLite keeps these texts in the file.
_TABLES = {
    "header": (
        "CREATE TABLE header (one INTEGER PRIMARY KEY CHECK (one = 1), data BLOB NOT NULL, "
        "list_mac BLOB NOT NULL)"
    ),
    "rows": """CREATE TABLE rows (
    kind TEXT NOT NULL, id BLOB NOT NULL, version INTEGER NOT NULL,
    wrapped_key BLOB NOT NULL, sealed BLOB NOT NULL, PRIMARY KEY (kind, id)
) WITHOUT ROWID""",
}


def make(path: Path, header: Header, list_mac: bytes) -> None:
    """A vault without rows at `path`, where it appears only when it is whole.

    Raises VaultError when there is something already, or when it cannot be written, and ConfigError when
    others could swap it.
    """
    try:
        make_private_folder(path.parent)
    except OSError as error:
        raise VaultError(f"cannot make {path.parent}: {error.strerror}") from error
    check_ownership(path.parent)
    new = temporary_name(path)
    try:
        os.close(os.open(new, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
        with translated(path), contextlib.closing(_connect(new, WAIT_SECONDS)) as connection:
            connection.execute("BEGIN")
            for table in _TABLES.values():
                connection.execute(table)
            connection.execute(f"PRAGMA application_id={_APPLICATION_ID}")
            connection.execute("INSERT INTO header VALUES (1, ?, ?)", (header.to_bytes(), list_mac))
            connection.execute("COMMIT")
        os.link(new, path)  # unlike a rename, this never replaces a vault made meanwhile
        sync_folder(path.parent)
    except FileExistsError as error:
        raise VaultError(f"there is a vault at {path} already") from error
    except OSError as error:
        raise VaultError(f"cannot write {path}: {error.strerror}") from error
    finally:
        with contextlib.suppress(OSError):
            new.unlink(missing_ok=True)


_BUSY = "another perfit is using {}; wait for it to finish, or use another --profile"
_process_locks: dict[Path, threading.Lock] = {}
_process_locks_lock = threading.Lock()


def lock_in_process(path: Path, wait_seconds: float) -> threading.Lock:
    """The acquired lock of this file among the threads of this process; any thread may release it.

    SQLite locks the file for the whole process, and POSIX drops that lock as soon as any thread closes any
    handle of the file. So only one thread may have it open. Raises VaultBusy.
    """
    with _process_locks_lock:
        lock = _process_locks.setdefault(path.resolve(), threading.Lock())
    if not lock.acquire(timeout=wait_seconds):
        raise VaultBusy(_BUSY.format(path))
    return lock


def attach(path: Path, wait_seconds: float, most: KdfParams) -> tuple[sqlite3.Connection, Header]:
    """Lock the file for this process and read its header.

    Raises NotFound, VaultBusy, VaultDamaged, VaultError when it is of a later format, or its key costs
    more than `most`, or ConfigError when others could swap it.
    """
    if not path.is_file():
        raise NotFound(f"there is no vault at {path}; `perfit enroll INVITE` makes one")
    for file in (path, path.with_name(f"{path.name}-journal")):  # SQLite would believe that, too
        check_ownership(file)
    with translated(path):
        connection = _connect(path, wait_seconds)
        try:
            damaged = VaultDamaged(f"{path} is not a whole vault; restore a copy of the file")
            # Before the lock, which would turn an empty file into an empty database.
            if connection.execute("PRAGMA application_id").fetchone()[0] != _APPLICATION_ID:
                raise damaged
            if not _counts_agree(path):
                raise damaged
            connection.execute("PRAGMA locking_mode=EXCLUSIVE")
            connection.execute("BEGIN EXCLUSIVE")  # also rolls back what a crash left half-done
            connection.execute("COMMIT")
            schema = connection.execute("SELECT name, sql FROM sqlite_schema ORDER BY name, sql").fetchall()
            if ("header", _TABLES["header"]) not in schema:
                raise damaged
            rows = connection.execute("SELECT data FROM header LIMIT 2").fetchall()
            if len(rows) != 1 or not isinstance(rows[0][0], bytes):
                raise damaged
            header = Header.from_bytes(
                rows[0][0], most
            )  # knows its format; a later one may have other tables
            if schema != sorted(_TABLES.items()):
                raise damaged
            _clear(path)
            return connection, header
        except BaseException:
            connection.close()
            raise


def _counts_agree(path: Path) -> bool:
    """Whether SQLite would believe the header's number of pages (its file format, 1.3.7 and 1.3.8).

    It writes both anew when it does not, before anything of ours has looked at the file. Beside a journal
    it takes the header from there.
    """
    if path.with_name(f"{path.name}-journal").exists():
        return True
    with path.open("rb") as file:
        header = file.read(100)
    return header[24:28] == header[92:96] and any(header[28:32])


def _clear(path: Path) -> None:
    """Remove what a kill left of half-made files; ours is the lock."""
    for left in path.parent.glob(f"{path.name}.*.new*"):
        with contextlib.suppress(OSError):
            left.unlink()


def _connect(path: Path, wait_seconds: float) -> sqlite3.Connection:
    # mode=rw: never make a file. isolation_level=None: transactions begin where we say so.
    # Used by one thread at a time, which the vault's lock sees to.
    # cached_statements=0: a statement kept for later keeps a copy of the row it wrote.
    connection = sqlite3.connect(
        f"{path.absolute().as_uri()}?mode=rw",
        uri=True,
        isolation_level=None,
        timeout=wait_seconds,
        check_same_thread=False,
        cached_statements=0,
    )
    try:
        for pragma in (
            "secure_delete=ON",
            "synchronous=FULL",
            "temp_store=MEMORY",
            "trusted_schema=OFF",
            "cache_size=-256",
            # While it holds the lock SQLite keeps the last change's journal, and a kill would leave it
            # there for good: pages with what was forgotten. With this it keeps an empty one.
            "journal_size_limit=0",
        ):
            connection.execute(f"PRAGMA {pragma}")
    except BaseException:
        connection.close()
        raise
    return connection


@contextlib.contextmanager
def translated(path: Path) -> Iterator[None]:
    """SQLite's errors as ours, by their codes."""
    try:
        yield
    except (UnicodeDecodeError, OverflowError) as error:  # a damaged schema, or text that is none
        raise VaultDamaged(f"{path} is damaged, and was left as it is; restore a copy of the file") from error
    except sqlite3.Error as error:
        name = getattr(error, "sqlite_errorname", "") or ""
        if name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
            raise VaultBusy(_BUSY.format(path)) from error
        if name.startswith("SQLITE_FULL"):
            raise VaultError(
                "the disk is full, so nothing was changed; free some space and try again"
            ) from error
        if name.startswith("SQLITE_READONLY"):
            raise VaultError(
                f"{path} cannot be written, so nothing was changed; make it, its folder and its disk writable"
            ) from error
        if name.startswith(("SQLITE_IOERR", "SQLITE_CANTOPEN", "SQLITE_PERM")):
            raise VaultError(f"cannot use {path}: {error}; nothing was changed") from error
        raise VaultDamaged(f"{path} is damaged, and was left as it is; restore a copy of the file") from error
