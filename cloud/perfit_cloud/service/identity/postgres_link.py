"""One connection to PostgreSQL, made when it is needed and made anew after it broke."""

from __future__ import annotations

import threading
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any, LiteralString

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from perfit_cloud.service.drain import stopping
from perfit_cloud.service.identity.postgres_format import SCHEMA
from perfit_shared.errors import Busy, ConfigError, StoreFailed

__all__ = ["Link", "connect", "translated"]

_LOCK_SECONDS = 2.0  # to wait for another thread of this process
_RETRY_MS = 1000
_SILENT_SECONDS = 5.0  # that a server may leave a statement unanswered, where no `statement_timeout` ends it
_SPARE_SECONDS = 1.0  # for a server to say that its own `statement_timeout` ended one
_DEFAULTS = {
    "application_name": "perfit-cloud",
    # A standby is behind the primary: it would let in who was revoked a moment ago.
    "target_session_attrs": "read-write",
    "connect_timeout": "2",  # seconds, of each host
    # A network that swallows everything is noticed in seconds, and not in TCP's quarter of an hour.
    "tcp_user_timeout": "3000",  # ms
    "keepalives_idle": "5",
    "keepalives_interval": "1",
    "keepalives_count": "3",
}
_SETTINGS: tuple[LiteralString, ...] = (
    f"SET search_path = {SCHEMA}",
    "SET synchronous_commit = on",  # a change is on the disk before anybody hears of it
    "SET lock_timeout = '2s'",
    "SET idle_in_transaction_session_timeout = '10s'",
)


class _Connection(psycopg.Connection[Any]):
    """Gives up a server that neither answers nor closes the connection: a machine or process that is frozen.

    The kernel goes on to acknowledge what is sent to a process that stands still, so TCP finds no fault, and
    the server's own timeouts stand still with it.
    """

    silent_seconds = _SILENT_SECONDS  # that may pass without a byte

    def wait(self, gen: Generator[Any, Any, Any], *args: Any, **kwargs: Any) -> Any:
        """Raises OperationalError where nothing comes; the connection is closed then."""
        try:
            return super().wait(_answered(gen, self.silent_seconds), *args, **kwargs)
        except _Silent:
            self.pgconn.finish()
            raise


class _Silent(psycopg.OperationalError):
    """The server said nothing for too long."""


def _answered(gen: Generator[Any, Any, Any], seconds: float) -> Generator[Any, Any, Any]:
    """psycopg's generator, as long as something comes. psycopg looks several times a second."""
    heard_at = time.monotonic()
    try:
        waits_for = next(gen)
        while True:
            ready = yield waits_for
            if ready:
                heard_at = time.monotonic()
            elif time.monotonic() - heard_at > seconds:
                raise _Silent(f"the database said nothing for {seconds:.0f} s")
            waits_for = gen.send(ready)
    except StopIteration as end:
        return end.value


def connect(conninfo: str, *, silent_seconds: float = _SILENT_SECONDS) -> psycopg.Connection[Any]:
    """A connection that commits each statement, unless in a transaction.

    A server that says nothing for `silent_seconds` while a statement waits is given up (OperationalError).
    Raises psycopg.Error, and ConfigError on what is no connection string.
    """
    try:
        given = conninfo_to_dict(conninfo)
    except psycopg.ProgrammingError:
        raise ConfigError("database should read like postgresql://user@host/name") from None
    missing = {key: value for key, value in _DEFAULTS.items() if key not in given}
    connection = _Connection.connect(make_conninfo(conninfo, **missing), autocommit=True)
    connection.silent_seconds = silent_seconds
    try:
        for statement in _SETTINGS:
            connection.execute(statement)
    except BaseException:
        connection.close()
        raise
    return connection


class Link:
    """Thread-safe; one thread at a time uses the connection."""

    def __init__(self, conninfo: str, *, statement_seconds: int) -> None:
        """Connects at first use. `statement_seconds`: after which the server gives up a statement, and a
        second later we give up a server that does not."""
        self._conninfo, self._statement_seconds = conninfo, statement_seconds
        self._lock = threading.Lock()
        self._connection: psycopg.Connection[Any] | None = None
        self._is_closed = False

    def close(self) -> None:
        if not self._lock.acquire(timeout=_LOCK_SECONDS):
            return  # a thread hangs in the network; let the process end
        try:
            self._is_closed = True
            self._drop()
        finally:
            self._lock.release()

    @contextmanager
    def connection(self) -> Iterator[psycopg.Connection[Any]]:
        """For single statements. Raises Busy, StoreFailed, Unavailable."""
        with self._held():
            yield self._connected()

    @contextmanager
    def transaction(self) -> Iterator[psycopg.Connection[Any]]:
        """Rolled back on any error. Raises as `connection` does."""
        with self._held():
            connection = self._connected()
            try:
                connection.execute("SELECT 1")
            except psycopg.OperationalError:  # it broke while nobody used it; nothing was asked of it yet
                self._drop()
                connection = self._connected()
            with connection.transaction():
                yield connection

    @contextmanager
    def _held(self) -> Iterator[None]:
        if not self._lock.acquire(timeout=_LOCK_SECONDS):
            raise _busy()
        try:
            if self._is_closed:
                raise stopping()
            with translated():
                yield
        finally:
            if self._connection is not None and self._connection.closed:  # `broken` ones are closed, too
                self._connection = None
            self._lock.release()

    def _connected(self) -> psycopg.Connection[Any]:
        if self._connection is None or self._connection.closed:
            silent_seconds = self._statement_seconds + _SPARE_SECONDS
            self._connection = connect(self._conninfo, silent_seconds=silent_seconds)
            self._connection.execute(
                "SELECT set_config('statement_timeout', %s, false)", (f"{self._statement_seconds}s",)
            )
        return self._connection

    def _drop(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


@contextmanager
def translated() -> Iterator[None]:
    """PostgreSQL's errors as ours: what passes by itself is Busy."""
    try:
        yield
    except (psycopg.OperationalError, psycopg.InterfaceError) as error:
        raise _busy() from error
    except psycopg.Error as error:
        raise StoreFailed(f"the list of devices cannot be used: {type(error).__name__}") from error


def _busy() -> Busy:
    return Busy("the cloud's list of devices is in use or away; try again", retry_ms=_RETRY_MS)
