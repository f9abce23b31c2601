"""The store in one SQLite file, `authority.db`, which several processes of one machine may open.

No file holds what a row held before: `secure_delete` overwrites it, and each change deletes the rollback
journal (a write-ahead log kept the dates of earlier certificates).
"""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from perfit_cloud.service.drain import stopping
from perfit_cloud.service.identity.sqlite_format import prepare
from perfit_cloud.service.identity.store import (
    MOST_CHALLENGES,
    UNUSED,
    ChallengeKey,
    Changes,
    Device,
    Enrolment,
    IdentityState,
    IdentityStore,
    InviteState,
    OpenInvite,
)
from perfit_shared.errors import Busy, StoreFailed

__all__ = ["SQLiteStore"]

_LOCK_SECONDS = 2.0  # to wait for another thread's write, then for another process's
_RETRY_MS = 1000
_SYNCHRONOUS = "FULL"  # a change is on the disk before anybody hears of it


class SQLiteStore(IdentityStore):
    """One connection, for one thread at a time."""

    def __init__(self, path: Path) -> None:
        """Open or make the file. Raises OSError, Busy, StoreFailed, or ConfigError for another format."""
        # Made with 0600 before SQLite opens it; its journal takes over the same mode.
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
        self._lock = threading.Lock()
        self._is_closed = False
        # isolation_level=None: transactions begin where we say so. cached_statements=0: a cached statement
        # keeps a copy of what it wrote.
        with _translated():
            self._db = sqlite3.connect(
                path,
                timeout=_LOCK_SECONDS,
                isolation_level=None,
                check_same_thread=False,
                cached_statements=0,
            )
        try:
            with _translated():
                self._db.execute("PRAGMA secure_delete = ON")
                self._db.execute(f"PRAGMA synchronous = {_SYNCHRONOUS}")
                self._db.execute("PRAGMA journal_mode = DELETE")
            with self._transaction() as db:
                prepare(db, path.parent)
        except BaseException:
            self._db.close()
            raise

    def close(self) -> None:
        if not self._lock.acquire(timeout=_LOCK_SECONDS):
            return  # a thread hangs in the file system; let the process end
        try:
            self._is_closed = True
            self._db.close()
        finally:
            self._lock.release()

    @contextmanager
    def _transaction(self, kind: str = "IMMEDIATE") -> Iterator[sqlite3.Connection]:
        """Rolled back on any error. IMMEDIATE: one writer at a time; DEFERRED: reads of one moment."""
        if not self._lock.acquire(timeout=_LOCK_SECONDS):
            raise _busy()
        try:
            if self._is_closed:
                raise stopping()
            with _translated():
                self._db.execute(f"BEGIN {kind}")
                try:
                    yield self._db
                    self._db.execute("COMMIT")
                except BaseException:
                    if self._db.in_transaction:  # a full disk makes SQLite roll back by itself
                        self._db.execute("ROLLBACK")
                    raise
        finally:
            self._lock.release()

    def setting(self, key: str, default: str) -> str:
        with self._transaction() as db:
            db.execute("INSERT OR IGNORE INTO meta VALUES (?, ?)", (key, default))
            return _meta(db, key)

    # -- invites ---------------------------------------------------------------------------------

    def add_invite(self, secret_hash: bytes, expires: int, label: str = "") -> None:
        with self._transaction() as db:
            db.execute(
                "INSERT INTO invites (secret_hash, expires, label) VALUES (?, ?, ?)",
                (secret_hash, expires, label),
            )

    def invite(self, secret_hash: bytes) -> InviteState | None:
        with self._transaction("DEFERRED") as db:
            row = db.execute(
                "SELECT expires, used, identity, key_hash, certificate FROM invites "
                "LEFT JOIN enrolments USING (secret_hash) WHERE secret_hash = ?",
                (secret_hash,),
            ).fetchone()
        if row is None:
            return None
        expires, is_used, *enrolment = row
        return InviteState(expires, bool(is_used), Enrolment(*enrolment) if enrolment[0] else None)

    def open_invites(self) -> list[OpenInvite]:
        with self._transaction("DEFERRED") as db:
            rows = db.execute(
                "SELECT secret_hash, expires, label FROM invites WHERE used = 0 ORDER BY expires, secret_hash"
            ).fetchall()
        return [OpenInvite(*row) for row in rows]

    def delete_invite(self, secret_hash: bytes) -> bool:
        with self._transaction() as db:
            deleted = db.execute("DELETE FROM invites WHERE secret_hash = ? AND used = 0", (secret_hash,))
        return bool(deleted.rowcount)

    def enroll(self, secret_hash: bytes, enrolment: Enrolment, *, issued: int, expires: int) -> bool:
        with self._transaction() as db:
            spent = db.execute(
                "UPDATE invites SET used = 1 WHERE secret_hash = ? AND used = 0", (secret_hash,)
            )
            if not spent.rowcount:
                return False
            db.execute(
                "INSERT INTO devices (identity, issued, expires, generation, used, sequence, label) "
                "SELECT ?, ?, ?, 1, ?, ?, label FROM invites WHERE secret_hash = ?",
                (enrolment.identity, issued, expires, UNUSED, _next_sequence(db), secret_hash),
            )
            db.execute("UPDATE invites SET label = '' WHERE secret_hash = ?", (secret_hash,))
            db.execute(
                "INSERT INTO enrolments (identity, secret_hash, key_hash, certificate) VALUES (?, ?, ?, ?)",
                (enrolment.identity, secret_hash, enrolment.key_hash, enrolment.certificate),
            )
        return True

    # -- identities ------------------------------------------------------------------------------

    def renew(self, identity: str, *, generation: int, issued: int, expires: int) -> int | None:
        with self._transaction() as db:
            db.execute(
                "UPDATE devices SET generation = max(generation, ?) + 1, issued = ?, expires = ? "
                "WHERE identity = ? AND revoked IS NULL",
                (generation, issued, expires, identity),
            )
            row = db.execute(
                "SELECT generation FROM devices WHERE identity = ? AND revoked IS NULL", (identity,)
            ).fetchone()
        return None if row is None else int(row[0])

    def write_marks(self, marks: Mapping[str, IdentityState]) -> None:
        with self._transaction() as db:
            sequence = _next_sequence(db)
            for identity, mark in marks.items():
                db.execute(
                    "UPDATE devices SET used = ?, sequence = ? WHERE identity = ? AND used < ?",
                    (mark.used, sequence, identity, mark.used),
                )
                if mark.used > UNUSED:
                    db.execute("DELETE FROM enrolments WHERE identity = ?", (identity,))
                # No new sequence number: it would reveal the time of day, and no other process asks.
                if mark.superseded is not None:
                    db.execute(
                        "UPDATE devices SET superseded = ? WHERE identity = ?", (mark.superseded, identity)
                    )

    def matching(self, prefix: str) -> list[str]:
        with self._transaction("DEFERRED") as db:
            rows = db.execute(
                "SELECT identity FROM devices WHERE substr(identity, 1, ?) = ? LIMIT 2", (len(prefix), prefix)
            ).fetchall()
        return [str(identity) for (identity,) in rows]

    def revoke(self, identity: str, at: int) -> None:
        with self._transaction() as db:
            db.execute(
                "UPDATE devices SET revoked = ?, sequence = ? WHERE identity = ? AND revoked IS NULL",
                (at, _next_sequence(db), identity),
            )

    def restore(self, identity: str) -> None:
        with self._transaction() as db:
            db.execute(
                "UPDATE devices SET revoked = NULL, sequence = ? WHERE identity = ? AND revoked IS NOT NULL",
                (_next_sequence(db), identity),
            )

    def set_label(self, identity: str, label: str) -> None:
        with self._transaction() as db:
            db.execute("UPDATE devices SET label = ? WHERE identity = ?", (label, identity))

    def changes(self, since: int) -> Changes:
        with self._transaction("DEFERRED") as db:
            last, pruned = int(_meta(db, "sequence")), int(_meta(db, "pruned"))
            # `since` is after the last if an old copy of the file was restored.
            is_complete = since == 0 or since < pruned or since > last
            rows = (
                []
                if since == last
                else db.execute(
                    "SELECT identity, used, revoked IS NOT NULL, superseded FROM devices WHERE sequence > ?",
                    (0 if is_complete else since,),
                ).fetchall()
            )
        states = {
            identity: IdentityState(used, bool(is_revoked), superseded)
            for identity, used, is_revoked, superseded in rows
        }
        return Changes(last, states, is_complete)

    def devices(self) -> list[Device]:
        with self._transaction("DEFERRED") as db:
            rows = db.execute(
                "SELECT identity, issued, expires, revoked, superseded, label FROM devices "
                "ORDER BY issued DESC, identity"
            ).fetchall()
        return [Device(*row) for row in rows]

    def prune(self, *, identities_before: int, invites_before: int) -> tuple[int, int]:
        with self._transaction() as db:
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
            if identities:  # a reader with an earlier number gets everything anew
                db.execute("UPDATE meta SET value = ? WHERE key = 'pruned'", (str(_next_sequence(db)),))
        return identities, invites

    # -- challenges ------------------------------------------------------------------------------

    def challenge_keys(self) -> list[ChallengeKey]:
        with self._transaction("DEFERRED") as db:
            rows = db.execute("SELECT number, key, made FROM challenge_keys ORDER BY number DESC").fetchall()
        return [ChallengeKey(*row) for row in rows]

    def add_challenge_key(self, key: bytes, *, made: int, after: int) -> None:
        with self._transaction() as db:
            (newest,) = db.execute("SELECT coalesce(max(number), 0) FROM challenge_keys").fetchone()
            if newest != after:
                return
            db.execute("DELETE FROM challenges WHERE key_number < ?", (after,))
            db.execute("DELETE FROM challenge_keys WHERE number < ?", (after,))
            db.execute("INSERT INTO challenge_keys VALUES (?, ?, ?)", (after + 1, key, made))

    def use_challenge(self, key_number: int, challenge_hash: bytes) -> bool:
        with self._transaction() as db:
            (used,) = db.execute(
                "SELECT count(*) FROM challenges WHERE key_number = ?", (key_number,)
            ).fetchone()
            if used >= MOST_CHALLENGES:
                raise _busy()
            return bool(
                db.execute(
                    "INSERT OR IGNORE INTO challenges SELECT ?, number FROM challenge_keys WHERE number = ?",
                    (challenge_hash, key_number),
                ).rowcount
            )


def _meta(db: sqlite3.Connection, key: str) -> str:
    return str(db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()[0])


def _next_sequence(db: sqlite3.Connection) -> int:
    sequence = int(_meta(db, "sequence")) + 1
    db.execute("UPDATE meta SET value = ? WHERE key = 'sequence'", (str(sequence),))
    return sequence


@contextmanager
def _translated() -> Iterator[None]:
    """SQLite's errors as ours."""
    try:
        yield
    except sqlite3.Error as error:
        if getattr(error, "sqlite_errorcode", 0) & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            raise _busy() from error
        raise StoreFailed(f"the list of devices cannot be used: {error}") from error


def _busy() -> Busy:
    return Busy("the cloud's list of devices is in use; try again", retry_ms=_RETRY_MS)
