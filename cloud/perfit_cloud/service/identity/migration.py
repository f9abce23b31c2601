"""Moves what a cloud remembers from the file in its state folder into PostgreSQL.

All of it is written in one transaction. Then the file is marked as moved, so that nobody who forgot to name
the database serves from what is old by then. A move that was cut short between the two is finished by the
next.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, LiteralString

import psycopg

from perfit_cloud.service.identity.postgres_format import prepare
from perfit_cloud.service.identity.postgres_link import connect
from perfit_cloud.service.identity.sqlite_format import FORMAT, MOVED
from perfit_cloud.service.identity.sqlite_store import SQLiteStore
from perfit_cloud.service.state_folder import DATABASE, is_served
from perfit_shared.errors import ConfigError, StoreFailed

__all__ = ["move"]

# The same columns on both sides, parents before children.
_TABLES: tuple[tuple[LiteralString, LiteralString, Sequence[str]], ...] = (
    ("invites", "secret_hash, expires, used, label", ("used",)),
    ("enrolments", "identity, secret_hash, key_hash, certificate", ()),
    ("devices", "identity, issued, expires, generation, used, revoked, superseded, sequence, label", ()),
    ("challenge_keys", "number, key, made", ()),
    ("challenges", "hash, key_number", ()),
)


def move(state: Path, database: str) -> dict[str, int]:
    """Rows by table.

    Raises ConfigError where a server runs, the file is not there or the target is not empty, StoreFailed and
    Busy when either cannot be used.
    """
    path = state / DATABASE
    if not path.exists():
        raise ConfigError(f"{state} holds no {DATABASE}; name the state folder with --state")
    if is_served(state):
        raise ConfigError("a server runs on this state folder; stop it first")
    SQLiteStore(path).close()  # of an earlier format: brought up to ours first
    try:
        with closing(sqlite3.connect(path, isolation_level=None)) as source, connect(database) as target:
            prepare(target)
            source.execute("BEGIN EXCLUSIVE")  # an `invite` that runs meanwhile would be lost
            with target.transaction():
                moved = _copy(source, target)
            source.execute("UPDATE meta SET value = ? WHERE key = 'format' AND value = ?", (MOVED, FORMAT))
            source.execute("COMMIT")
    except (sqlite3.Error, psycopg.Error) as error:
        raise StoreFailed(f"the state was not moved: {type(error).__name__}: {error}") from error
    return moved


def _copy(source: sqlite3.Connection, target: psycopg.Connection[Any]) -> dict[str, int]:
    meta = dict(source.execute("SELECT key, value FROM meta").fetchall())
    target.execute("SELECT FROM counters FOR UPDATE")
    found = dict(target.execute("SELECT key, value FROM meta").fetchall())
    if found.get("cloud_id") == meta["cloud_id"]:
        return _counted(target)  # an earlier try came so far
    if "cloud_id" in found or any(_counted(target).values()):
        raise ConfigError("the database has a cloud in it already; name an empty one")
    for table, columns, booleans in _TABLES:
        names = columns.split(", ")
        rows = [
            tuple(bool(value) if name in booleans else value for name, value in zip(names, row, strict=True))
            for row in source.execute(f"SELECT {columns} FROM {table}")  # noqa: S608 - of the table above
        ]
        marks = ", ".join(["%s"] * len(names))
        with target.cursor() as cursor:
            cursor.executemany(f"INSERT INTO {table} ({columns}) VALUES ({marks})", rows)  # noqa: S608
    target.execute(
        "UPDATE counters SET sequence = %s, pruned = %s", (int(meta["sequence"]), int(meta["pruned"]))
    )
    for key, value in meta.items():
        if key not in ("format", "sequence", "pruned"):
            target.execute("INSERT INTO meta VALUES (%s, %s)", (key, value))
    return _counted(target)


def _counted(target: psycopg.Connection[Any]) -> dict[str, int]:
    counts = {}
    for table, _, _ in _TABLES:
        row = target.execute(f"SELECT count(*) FROM {table}").fetchone()  # noqa: S608
        counts[str(table)] = int(str(row[0])) if row else 0
    return counts
