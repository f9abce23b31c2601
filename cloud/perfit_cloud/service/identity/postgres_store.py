"""The store in PostgreSQL, which all processes of a fleet share.

Three connections: one that changes things, one that reads what changed, so that no look waits for a change,
and, where somebody asks to be woken, one that listens. All go to the primary.

Unlike the SQLite store this cannot promise that nothing holds what a row held before: PostgreSQL keeps old
rows until VACUUM, and its write-ahead log and backups keep them longer.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from typing import Any

import psycopg

from perfit_cloud.service.identity.postgres_format import CHANNEL, prepare
from perfit_cloud.service.identity.postgres_link import Link, connect
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
from perfit_shared.errors import Busy

__all__ = ["PostgresStore"]

_log = logging.getLogger(__name__)
_WRITE_SECONDS = 5
_READ_SECONDS = 15  # all of a million identities take some
_LISTEN_SECONDS = 1.0  # between two looks whether the store was closed; and before listening anew
_PROBE_LOOKS = 10  # after so many of these without a word, ask whether anybody is there
_RETRY_MS = 1000


class PostgresStore(IdentityStore):
    def __init__(self, conninfo: str) -> None:
        """`conninfo`: as libpq reads it; a password belongs into its own file or variable.

        Raises ConfigError, Busy when the database cannot be reached, StoreFailed.
        """
        self._conninfo = conninfo
        self._writes = Link(conninfo, statement_seconds=_WRITE_SECONDS)
        self._reads = Link(conninfo, statement_seconds=_READ_SECONDS)
        self._is_over = threading.Event()
        try:
            with self._writes.connection() as db:
                prepare(db)
        except BaseException:
            self._writes.close()
            raise

    def close(self) -> None:
        self._is_over.set()
        self._writes.close()
        self._reads.close()

    def setting(self, key: str, default: str) -> str:
        with self._writes.transaction() as db:
            found = db.execute("SELECT value FROM meta WHERE key = %s", (key,)).fetchone()
            if found is not None:  # nothing to write, so a role that may only read can serve
                return str(found[0])
            db.execute("INSERT INTO meta VALUES (%s, %s) ON CONFLICT DO NOTHING", (key, default))
            return str(_one(db.execute("SELECT value FROM meta WHERE key = %s", (key,))))

    # -- invites ---------------------------------------------------------------------------------

    def add_invite(self, secret_hash: bytes, expires: int, label: str = "") -> None:
        with self._writes.transaction() as db:
            db.execute(
                "INSERT INTO invites (secret_hash, expires, label) VALUES (%s, %s, %s)",
                (secret_hash, expires, label),
            )

    def invite(self, secret_hash: bytes) -> InviteState | None:
        with self._writes.transaction() as db:
            row = db.execute(
                "SELECT expires, used, identity, key_hash, certificate FROM invites "
                "LEFT JOIN enrolments USING (secret_hash) WHERE secret_hash = %s",
                (secret_hash,),
            ).fetchone()
        if row is None:
            return None
        expires, is_used, *enrolment = row
        return InviteState(expires, is_used, Enrolment(*enrolment) if enrolment[0] else None)

    def open_invites(self) -> list[OpenInvite]:
        with self._writes.transaction() as db:
            rows = db.execute(
                "SELECT secret_hash, expires, label FROM invites WHERE NOT used ORDER BY expires, secret_hash"
            ).fetchall()
        return [OpenInvite(*row) for row in rows]

    def delete_invite(self, secret_hash: bytes) -> bool:
        with self._writes.transaction() as db:
            deleted = db.execute("DELETE FROM invites WHERE secret_hash = %s AND NOT used", (secret_hash,))
        return bool(deleted.rowcount)

    def enroll(self, secret_hash: bytes, enrolment: Enrolment, *, issued: int, expires: int) -> bool:
        with self._writes.transaction() as db:
            # The counters are locked first here as elsewhere, so that no two wait for each other.
            sequence = _next_sequence(db)
            spent = db.execute(
                "UPDATE invites SET used = true WHERE secret_hash = %s AND NOT used RETURNING label",
                (secret_hash,),
            ).fetchone()
            if spent is None:
                raise psycopg.Rollback
            db.execute(
                "INSERT INTO devices (identity, issued, expires, generation, used, sequence, label) "
                "VALUES (%s, %s, %s, 1, %s, %s, %s)",
                (enrolment.identity, issued, expires, UNUSED, sequence, spent[0]),
            )
            db.execute("UPDATE invites SET label = '' WHERE secret_hash = %s", (secret_hash,))
            db.execute(
                "INSERT INTO enrolments (identity, secret_hash, key_hash, certificate) "
                "VALUES (%s, %s, %s, %s)",
                (enrolment.identity, secret_hash, enrolment.key_hash, enrolment.certificate),
            )
            return True
        return False

    # -- identities ------------------------------------------------------------------------------

    def renew(self, identity: str, *, generation: int, issued: int, expires: int) -> int | None:
        with self._writes.transaction() as db:
            row = db.execute(
                "UPDATE devices SET generation = greatest(generation, %s) + 1, issued = %s, expires = %s "
                "WHERE identity = %s AND revoked IS NULL RETURNING generation",
                (generation, issued, expires, identity),
            ).fetchone()
        return None if row is None else int(row[0])

    def write_marks(self, marks: Mapping[str, IdentityState]) -> None:
        identities = list(marks)
        used = [mark.used for mark in marks.values()]
        days = [mark.superseded for mark in marks.values()]
        with self._writes.transaction() as db:
            db.execute(
                "UPDATE devices SET used = mark.used, sequence = %s "
                "FROM unnest(%s::text[], %s::bigint[]) AS mark (identity, used) "
                "WHERE devices.identity = mark.identity AND devices.used < mark.used",
                (_next_sequence(db), identities, used),
            )
            db.execute(
                "DELETE FROM enrolments WHERE identity = ANY(%s)",
                ([identity for identity, mark in marks.items() if mark.used > UNUSED],),
            )
            # No new sequence number: it would reveal the time of day, and no other process asks.
            db.execute(
                "UPDATE devices SET superseded = mark.day "
                "FROM unnest(%s::text[], %s::bigint[]) AS mark (identity, day) "
                "WHERE devices.identity = mark.identity AND mark.day IS NOT NULL",
                (identities, days),
            )

    def matching(self, prefix: str) -> list[str]:
        with self._writes.transaction() as db:
            rows = db.execute(
                "SELECT identity FROM devices WHERE identity ^@ %s LIMIT 2", (prefix,)
            ).fetchall()
        return [str(identity) for (identity,) in rows]

    def revoke(self, identity: str, at: int) -> None:
        with self._writes.transaction() as db:
            db.execute(
                "UPDATE devices SET revoked = %s, sequence = %s WHERE identity = %s AND revoked IS NULL",
                (at, _next_sequence(db), identity),
            )
            _notify(db)

    def restore(self, identity: str) -> None:
        with self._writes.transaction() as db:
            db.execute(
                "UPDATE devices SET revoked = NULL, sequence = %s "
                "WHERE identity = %s AND revoked IS NOT NULL",
                (_next_sequence(db), identity),
            )
            _notify(db)

    def set_label(self, identity: str, label: str) -> None:
        with self._writes.transaction() as db:
            db.execute("UPDATE devices SET label = %s WHERE identity = %s", (label, identity))

    def changes(self, since: int) -> Changes:
        with self._reads.connection() as db:
            # One statement sees one moment. `since` is after the last if an old copy was restored.
            rows = db.execute(
                "SELECT c.sequence, c.is_complete, d.identity, d.used, d.revoked IS NOT NULL, d.superseded "
                "FROM (SELECT sequence, %(since)s = 0 OR %(since)s < pruned OR %(since)s > sequence "
                "AS is_complete FROM counters) c "
                "LEFT JOIN devices d ON d.sequence > CASE WHEN c.is_complete THEN 0 ELSE %(since)s END",
                {"since": since},
            ).fetchall()
        states = {
            identity: IdentityState(used, is_revoked, superseded)
            for _, _, identity, used, is_revoked, superseded in rows
            if identity is not None
        }
        return Changes(int(rows[0][0]), states, bool(rows[0][1]))

    def on_change(self, wake: Callable[[], None]) -> None:
        threading.Thread(target=self._listen, args=(wake,), name="perfit-listen", daemon=True).start()

    def _listen(self, wake: Callable[[], None]) -> None:
        """What is missed here is found by the next look, so errors need nobody's care."""
        while not self._is_over.is_set():
            try:
                with connect(self._conninfo) as db:
                    db.execute(f"LISTEN {CHANNEL}")
                    wake()  # for what came before
                    quiet = 0
                    while not self._is_over.is_set():
                        quiet += 1
                        for _ in db.notifies(timeout=_LISTEN_SECONDS):
                            quiet = 0
                            wake()
                        if quiet >= _PROBE_LOOKS:  # or it would listen to a frozen server for ever
                            db.execute("SELECT 1")
                            quiet = 0
            except psycopg.Error as error:
                _log.debug("cannot listen for revocations: %s", type(error).__name__)
                self._is_over.wait(_LISTEN_SECONDS)

    def devices(self) -> list[Device]:
        with self._writes.transaction() as db:
            rows = db.execute(
                "SELECT identity, issued, expires, revoked, superseded, label FROM devices "
                "ORDER BY issued DESC, identity"
            ).fetchall()
        return [Device(*row) for row in rows]

    def prune(self, *, identities_before: int, invites_before: int) -> tuple[int, int]:
        with self._writes.transaction() as db:
            sequence = _next_sequence(db)
            db.execute(
                "DELETE FROM enrolments USING devices "
                "WHERE enrolments.identity = devices.identity AND devices.expires < %s",
                (identities_before,),
            )
            identities = db.execute("DELETE FROM devices WHERE expires < %s", (identities_before,)).rowcount
            invites = db.execute(
                "DELETE FROM invites WHERE expires < %s AND NOT EXISTS "
                "(SELECT FROM enrolments WHERE enrolments.secret_hash = invites.secret_hash)",
                (invites_before,),
            ).rowcount
            if identities:  # a reader with an earlier number gets everything anew
                db.execute("UPDATE counters SET pruned = %s", (sequence,))
                _notify(db)
        return identities, invites

    # -- challenges ------------------------------------------------------------------------------

    def challenge_keys(self) -> list[ChallengeKey]:
        with self._writes.transaction() as db:
            rows = db.execute("SELECT number, key, made FROM challenge_keys ORDER BY number DESC").fetchall()
        return [ChallengeKey(*row) for row in rows]

    def add_challenge_key(self, key: bytes, *, made: int, after: int) -> None:
        with self._writes.transaction() as db:
            db.execute("SELECT FROM counters FOR UPDATE")  # one process at a time
            if _one(db.execute("SELECT coalesce(max(number), 0) FROM challenge_keys")) != after:
                return
            db.execute("DELETE FROM challenge_keys WHERE number < %s", (after,))  # and its challenges
            db.execute("INSERT INTO challenge_keys VALUES (%s, %s, %s)", (after + 1, key, made))

    def use_challenge(self, key_number: int, challenge_hash: bytes) -> bool:
        with self._writes.transaction() as db:
            used = _one(db.execute("SELECT count(*) FROM challenges WHERE key_number = %s", (key_number,)))
            if used >= MOST_CHALLENGES:
                raise Busy("too many challenges are in use; try again", retry_ms=_RETRY_MS)
            return bool(
                db.execute(
                    "INSERT INTO challenges SELECT %s, number FROM challenge_keys WHERE number = %s "
                    "FOR KEY SHARE ON CONFLICT DO NOTHING",
                    (challenge_hash, key_number),
                ).rowcount
            )


def _one(cursor: psycopg.Cursor[Any]) -> Any:
    """The one value of a statement that always gives a row."""
    row = cursor.fetchone()
    if row is None:
        raise psycopg.DataError("a row is missing")
    return row[0]


def _next_sequence(db: psycopg.Connection[Any]) -> int:
    """Locks the counters until the transaction ends, so that numbers become visible in order."""
    return int(_one(db.execute("UPDATE counters SET sequence = sequence + 1 RETURNING sequence")))


def _notify(db: psycopg.Connection[Any]) -> None:
    """Wake all who listen, once this is committed."""
    db.execute("SELECT pg_notify(%s, '')", (CHANNEL,))
