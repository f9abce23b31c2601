"""The tables in PostgreSQL, as numbered migrations that only ever add to what is there.

A migration that ran is never edited. Replicas of the version before go on with the tables of this one, so a
fleet is updated a replica at a time: the first new one migrates, under a lock.
"""

from __future__ import annotations

from typing import Any, LiteralString

import psycopg
from psycopg.errors import InsufficientPrivilege

from perfit_shared.errors import ConfigError

__all__ = ["CHANNEL", "FORMAT", "SCHEMA", "prepare"]

SCHEMA = "perfit"  # of all tables, so that they share a database with others' unharmed
CHANNEL = "perfit_revocations"  # of NOTIFY
_LOCK = 0x70657266  # "perf", for the advisory lock

_MIGRATIONS: tuple[tuple[LiteralString, ...], ...] = (
    (
        """CREATE TABLE invites (
        secret_hash BYTEA PRIMARY KEY,  -- sha-256: whoever reads the table cannot enrol
        expires BIGINT NOT NULL,        -- unix seconds
        used BOOLEAN NOT NULL DEFAULT false,
        label TEXT NOT NULL DEFAULT ''
    )""",
        """CREATE TABLE enrolments (
        identity TEXT COLLATE "C" PRIMARY KEY,
        secret_hash BYTEA NOT NULL UNIQUE,
        key_hash BYTEA NOT NULL,        -- sha-256 of the device's public key
        certificate BYTEA NOT NULL      -- DER, to answer a repeated request
    )""",
        """CREATE TABLE devices (
        identity TEXT COLLATE "C" PRIMARY KEY,
        issued BIGINT NOT NULL,         -- unix seconds: of the newest certificate
        expires BIGINT NOT NULL,
        generation BIGINT NOT NULL,     -- of the newest certificate: 1, 2, …
        used BIGINT NOT NULL,           -- the newest generation that was used; older ones are retired
        revoked BIGINT,                 -- unix seconds, NULL while welcome
        superseded BIGINT,              -- unix seconds, of a day: a retired certificate was last presented
        sequence BIGINT NOT NULL,       -- of the row's last change that calls ask about
        label TEXT NOT NULL DEFAULT ''
    )""",
        "CREATE INDEX devices_by_sequence ON devices (sequence)",
        """CREATE TABLE challenge_keys (
        number BIGINT PRIMARY KEY,
        key BYTEA NOT NULL,
        made BIGINT NOT NULL            -- unix seconds
    )""",
        """CREATE TABLE challenges (
        hash BYTEA PRIMARY KEY,         -- sha-256 of a challenge that was used: it tells no time
        key_number BIGINT NOT NULL REFERENCES challenge_keys ON DELETE CASCADE
    )""",
        "CREATE INDEX challenges_by_key ON challenges (key_number)",
        # One row: the newest sequence number that was given out, and that of the last deletion of identities.
        # Whoever changes identities locks it first, so that numbers become visible in order.
        "CREATE TABLE counters (sequence BIGINT NOT NULL, pruned BIGINT NOT NULL)",
        "INSERT INTO counters VALUES (1, 0)",
    ),
)
FORMAT = len(_MIGRATIONS)


def prepare(connection: psycopg.Connection[Any]) -> None:
    """Bring the tables up to ours, in one transaction.

    Raises ConfigError for those of a later version, and for a role that may not do what is to be done.
    """
    try:
        _prepare(connection)
    except InsufficientPrivilege:
        raise ConfigError(
            "this role of PostgreSQL may not make or read perfit's tables; start the enrolling server of "
            "this version first, then run deploy/postgres/roles.sql again"
        ) from None


def _prepare(connection: psycopg.Connection[Any]) -> None:
    if _found(connection) == FORMAT:  # nothing to create, so a role that may not create can serve
        return
    with connection.transaction():
        connection.execute("SELECT pg_advisory_xact_lock(%s)", (_LOCK,))
        # IF NOT EXISTS would ask for the right to create schemas even where this one is there.
        if connection.execute("SELECT to_regnamespace(%s)::text", (SCHEMA,)).fetchone() == (None,):
            connection.execute(f"CREATE SCHEMA {SCHEMA}")
        connection.execute("CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL)")
        found = _found(connection)  # another process may have been faster
        if found > FORMAT:
            raise ConfigError("the database was written by a later version of perfit-cloud; update this one")
        for migration in _MIGRATIONS[found:]:
            for statement in migration:
                connection.execute(statement)
        connection.execute(
            "INSERT INTO meta VALUES ('format', %s) ON CONFLICT (key) DO UPDATE SET value = excluded.value",
            (str(FORMAT),),
        )


def _found(connection: psycopg.Connection[Any]) -> int:
    """The format of the tables that are there; 0: none."""
    row = connection.execute("SELECT to_regclass(%s)::text", (f"{SCHEMA}.meta",)).fetchone()
    if row is None or row[0] is None:
        return 0
    row = connection.execute("SELECT value FROM meta WHERE key = 'format'").fetchone()
    return 0 if row is None else int(row[0])
