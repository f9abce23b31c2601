"""Which store a cloud remembers its identities in."""

from __future__ import annotations

from pathlib import Path

from perfit_cloud.service.identity.sqlite_store import SQLiteStore
from perfit_cloud.service.identity.store import IdentityStore
from perfit_cloud.service.state_folder import DATABASE
from perfit_shared.errors import ConfigError

__all__ = ["open_store"]


def open_store(state: Path, database: str) -> IdentityStore:
    """PostgreSQL where `database` names one, as libpq reads it; else the file in the state folder.

    Raises OSError, ConfigError, Busy, StoreFailed.
    """
    if not database:
        return SQLiteStore(state / DATABASE)
    try:
        from perfit_cloud.service.identity.postgres_store import PostgresStore
    except ImportError:  # not there, or without its library
        raise ConfigError("a database needs the fleet extra: pip install 'perfit[fleet]'") from None
    return PostgresStore(database)
