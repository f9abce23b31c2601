"""The tables of `authority.db`, and how a file of an earlier format becomes one of ours.

1   no generations; every invite kept the certificate it was answered with
2   no challenges, no sequence numbers
3   no labels
4   this one
"""

from __future__ import annotations

import sqlite3
from pathlib import Path

from perfit_cloud.service.identity.certificates import identity_of, read_certificate
from perfit_cloud.service.identity.store import UNUSED
from perfit_cloud.service.state_folder import is_served
from perfit_shared.errors import ConfigError, NotAuthenticated

__all__ = ["FORMAT", "MOVED", "prepare"]

FORMAT = "4"
MOVED = "moved to PostgreSQL"  # the format of a file whose rows are there
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
_SINCE_3 = (
    # The sequence number of the row's last change that calls ask about: it came, was used, was revoked.
    "ALTER TABLE devices ADD COLUMN sequence INTEGER NOT NULL DEFAULT 1",
    """CREATE TABLE challenge_keys (
    number INTEGER PRIMARY KEY,
    key BLOB NOT NULL,
    made INTEGER NOT NULL           -- unix seconds
)""",
    """CREATE TABLE challenges (
    hash BLOB PRIMARY KEY,          -- sha-256 of a challenge that was used: it tells no time
    key_number INTEGER NOT NULL
) WITHOUT ROWID""",
    # The newest sequence number that was given out, and that of the last deletion of identities.
    "INSERT INTO meta VALUES ('sequence', '1'), ('pruned', '0')",
)
# The operator's own words. An invite's go to the device that it lets in, and are deleted here.
_SINCE_4 = (
    "ALTER TABLE invites ADD COLUMN label TEXT NOT NULL DEFAULT ''",
    "ALTER TABLE devices ADD COLUMN label TEXT NOT NULL DEFAULT ''",
)


def prepare(db: sqlite3.Connection, folder: Path) -> None:
    """Make the tables, or bring those of an earlier format up to ours. Raises ConfigError for another."""
    db.execute("CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL)")
    row = db.execute("SELECT value FROM meta WHERE key = 'format'").fetchone()
    found = None if row is None else str(row[0])
    if found == FORMAT:
        return
    if found == MOVED:
        raise ConfigError(f"what {folder} held was moved to PostgreSQL; set `database` to where it is")
    if found not in (None, "1", "2", "3"):
        raise ConfigError(f"{folder} was written by another version of perfit-cloud")
    if found is not None and is_served(folder):  # it could no longer write to the file
        raise ConfigError("the running server is of an earlier version of perfit-cloud; restart it first")
    if found is None:
        _run(db, _TABLES)
    elif found == "1":
        _from_format_1(db)
    if found != "3":
        _run(db, _SINCE_3)
    _run(db, _SINCE_4)
    db.execute("INSERT OR REPLACE INTO meta VALUES ('format', ?)", (FORMAT,))


def _run(db: sqlite3.Connection, statements: tuple[str, ...]) -> None:
    for statement in statements:  # `executescript` would commit
        db.execute(statement)


def _from_format_1(db: sqlite3.Connection) -> None:
    """Make the tables of format 2 out of those of format 1."""
    db.execute("ALTER TABLE invites RENAME TO old_invites")
    db.execute("ALTER TABLE devices RENAME TO old_devices")
    _run(db, _TABLES)
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
