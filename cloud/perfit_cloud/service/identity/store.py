"""The database of invites and identities: what is written about a device, and nothing else.

    invites      of each, a hash, when it ends and whether it was used: nothing that leads to an identity
    enrolments   the answer to an invite, until its certificate was used for the first time, since replies
                 get lost; then the row goes, and with it what joined invite and identity
    devices      dates of the newest certificate, how many there were, the newest that was used

What a row held before stands in no file: `secure_delete` overwrites it, and the rollback journal is gone
after each change (a write-ahead log kept the dates of earlier certificates). Rows go only when somebody
says so by a date of theirs (`IdentityStore.prune`): a clock that is wrong deletes nothing.
"""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from perfit_cloud.service.drain import stopping
from perfit_cloud.service.identity.certificates import identity_of, read_certificate
from perfit_shared.errors import Busy, ConfigError, NotAuthenticated

__all__ = ["UNUSED", "Device", "IdentityState", "IdentityStore"]

UNUSED = -1  # no certificate was used yet; those that were written before there were generations have 0
_LOCK_SECONDS = 2.0  # how long another thread's, then another process's write is waited for
_RETRY_MS = 1000
_FORMAT = "2"
_TABLES = (
    """CREATE TABLE invites (
    secret_hash BLOB PRIMARY KEY,   -- sha-256: whoever reads this file cannot enrol
    expires INTEGER NOT NULL,       -- unix seconds
    used INTEGER NOT NULL DEFAULT 0
) WITHOUT ROWID""",
    """CREATE TABLE enrolments (
    identity TEXT PRIMARY KEY,
    secret_hash BLOB NOT NULL UNIQUE,
    key_hash BLOB NOT NULL,         -- sha-256 of the device's public key
    certificate BLOB NOT NULL       -- DER, to answer a repeated request
) WITHOUT ROWID""",
    """CREATE TABLE devices (
    identity TEXT PRIMARY KEY,
    issued INTEGER NOT NULL,        -- unix seconds: of the newest certificate
    expires INTEGER NOT NULL,
    generation INTEGER NOT NULL,    -- of the newest certificate: 1, 2, …
    used INTEGER NOT NULL,          -- the newest generation that was used; older ones are retired
    revoked INTEGER,                -- unix seconds, NULL while welcome
    superseded INTEGER              -- unix seconds, of a day: a retired certificate was last presented
) WITHOUT ROWID""",
)


class IdentityState(NamedTuple):
    """What a call asks of an identity."""

    used: int  # newest generation of its certificates that was used, or UNUSED
    is_revoked: bool = False
    superseded: int | None = None  # the day on which a retired certificate was last presented


@dataclass(frozen=True)
class Device:
    """What is known of a device: dates."""

    identity: str  # 32 hex digits, in its certificate
    issued: int  # unix seconds, of its newest certificate
    expires: int
    revoked: int | None
    superseded: int | None  # unix seconds, of the day on which a retired certificate was last presented


class IdentityStore:
    """One connection, for one thread at a time; several processes may open one file."""

    def __init__(self, path: Path) -> None:
        """Raises sqlite3.Error, OSError, Busy, or ConfigError for a file of another version."""
        # Made with 0600 before SQLite opens it; its journal takes over the same mode.
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
        self._lock = threading.RLock()
        self._is_closed = False
        # isolation_level=None: transactions begin where we say so. cached_statements=0: a statement kept
        # for later keeps a copy of what it wrote.
        self._db = sqlite3.connect(
            path, timeout=_LOCK_SECONDS, isolation_level=None, check_same_thread=False, cached_statements=0
        )
        self._version = -1
        try:
            with _busy_when_locked():
                self._db.execute("PRAGMA secure_delete = ON")
                self._db.execute("PRAGMA synchronous = FULL")
                self._db.execute("PRAGMA journal_mode = DELETE")
                with self.transaction() as db:
                    _prepare(db, path)
        except BaseException:
            self._db.close()
            raise

    def close(self) -> None:
        """Calls that outlive it are told that the cloud is stopping."""
        if not self._lock.acquire(timeout=_LOCK_SECONDS):
            return  # a thread hangs in the file system; the process ends all the same
        try:
            self._is_closed = True
            self._db.close()
        finally:
            self._lock.release()

    @contextmanager
    def held(self) -> Iterator[sqlite3.Connection]:
        """For one thread at a time, and again for that one. Raises Unavailable once closed, and Busy."""
        if not self._lock.acquire(timeout=_LOCK_SECONDS):
            raise _busy()
        try:
            if self._is_closed:
                raise stopping()
            yield self._db
        finally:
            self._lock.release()

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """One writer at a time, in this process and in others; rolled back on any error.

        Raises Busy when another process does not let go of the database.
        """
        with self.held() as db, _busy_when_locked():
            db.execute("BEGIN IMMEDIATE")
            try:
                yield db
                db.execute("COMMIT")
            except BaseException:
                if db.in_transaction:  # a full disk makes SQLite roll back by itself
                    db.execute("ROLLBACK")
                raise

    def meta(self, key: str, default: str) -> str:
        """The stored value of `key`; the first process to ask stores its default."""
        with self.transaction() as db:
            db.execute("INSERT OR IGNORE INTO meta VALUES (?, ?)", (key, default))
            return str(db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()[0])

    def changed_states(self) -> dict[str, IdentityState] | None:
        """All identities, when another process wrote since the last look; the first look reads them, too.

        Raises Busy.
        """
        with self.held() as db, _busy_when_locked():
            version = int(db.execute("PRAGMA data_version").fetchone()[0])
            if version == self._version:
                return None
            rows = db.execute(
                "SELECT identity, used, revoked IS NOT NULL, superseded FROM devices"
            ).fetchall()
            self._version = version
        return {
            identity: IdentityState(used, bool(is_revoked), superseded)
            for identity, used, is_revoked, superseded in rows
        }

    def devices(self) -> list[Device]:
        """All identities, newest certificate first. Raises Busy."""
        with self.held() as db, _busy_when_locked():
            rows = db.execute(
                "SELECT identity, issued, expires, revoked, superseded FROM devices "
                "ORDER BY issued DESC, identity"
            ).fetchall()
        return [Device(*row) for row in rows]

    def prune(self, *, identities_before: int, invites_before: int) -> tuple[int, int]:
        """Delete what ended before those unix seconds: how many identities, and how many invites."""
        with self.transaction() as db:
            db.execute(
                "DELETE FROM enrolments WHERE identity IN (SELECT identity FROM devices WHERE expires < ?)",
                (identities_before,),
            )
            identities = db.execute("DELETE FROM devices WHERE expires < ?", (identities_before,)).rowcount
            invites = db.execute(
                "DELETE FROM invites WHERE expires < ? AND secret_hash NOT IN "
                "(SELECT secret_hash FROM enrolments)",
                (invites_before,),
            ).rowcount
        return identities, invites


@contextmanager
def _busy_when_locked() -> Iterator[None]:
    try:
        yield
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode & 0xFF not in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            raise
        raise _busy() from error


def _busy() -> Busy:
    return Busy("the cloud's list of devices is in use; try again", retry_ms=_RETRY_MS)


def _prepare(db: sqlite3.Connection, path: Path) -> None:
    """Make the tables, or those of format 1 into ours. Raises ConfigError for another format."""
    db.execute("CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL)")
    row = db.execute("SELECT value FROM meta WHERE key = 'format'").fetchone()
    found = None if row is None else str(row[0])
    if found == _FORMAT:
        return
    if found not in (None, "1"):
        raise ConfigError(f"{path.parent} was written by another version of perfit-cloud")
    if found is None:
        _make_tables(db)
    else:
        _upgrade(db)
    db.execute("INSERT OR REPLACE INTO meta VALUES ('format', ?)", (_FORMAT,))


def _make_tables(db: sqlite3.Connection) -> None:
    for table in _TABLES:  # `executescript` would commit
        db.execute(table)


def _upgrade(db: sqlite3.Connection) -> None:
    """Format 1 knew no generations, and kept each invite's certificate."""
    db.execute("ALTER TABLE invites RENAME TO old_invites")
    db.execute("ALTER TABLE devices RENAME TO old_devices")
    _make_tables(db)
    db.execute(
        "INSERT INTO devices SELECT identity, issued, expires, 0, ?, revoked, NULL FROM old_devices",
        (UNUSED,),
    )
    db.execute("INSERT INTO invites SELECT secret_hash, expires, key_hash IS NOT NULL FROM old_invites")
    for secret_hash, key_hash, certificate in db.execute(
        "SELECT secret_hash, key_hash, certificate FROM old_invites WHERE key_hash IS NOT NULL"
    ).fetchall():
        try:
            identity = identity_of(read_certificate(certificate))
        except NotAuthenticated:
            continue  # nobody can be answered with it
        db.execute(
            "INSERT OR IGNORE INTO enrolments SELECT identity, ?, ?, ? FROM devices WHERE identity = ?",
            (secret_hash, key_hash, certificate, identity),
        )
    db.execute("DROP TABLE old_invites")
    db.execute("DROP TABLE old_devices")
