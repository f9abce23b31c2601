"""Identities in memory: what every call asks, so that no call waits for the database.

A thread looks twice a second whether another process wrote (`perfit-cloud revoke`), and writes down which
certificates were used. When the database cannot be read, calls go on with what was known last, and the
log and a metric say since when.
"""

from __future__ import annotations

import logging
import sqlite3
import threading
import time
from collections.abc import Mapping

from perfit_cloud.service.drain import stopping
from perfit_cloud.service.identity.store import UNUSED, IdentityState, IdentityStore
from perfit_shared.errors import PerfitError

__all__ = ["IdentityCache"]

_log = logging.getLogger(__name__)
_REFRESH_SECONDS = 0.5
_LOOK_SECONDS = 1.0  # how long a call of an unknown device waits for another one's look
_STALE_SECONDS = 10.0  # without a look at the database, after which the log says so
_STOP_SECONDS = 5.0  # for the thread to end, should the database be stuck
_DAY = 86400


class IdentityCache:
    """Thread-safe. Without `start`, `refresh` is what looks at the database."""

    def __init__(self, store: IdentityStore) -> None:
        """Raises Busy, or sqlite3.Error."""
        self._store = store
        self._lock = threading.Lock()  # held for moments, never while the database is waited for
        self._states: dict[str, IdentityState] = {}
        self._unwritten: dict[str, IdentityState] = {}  # marks that the database does not have yet
        self._looking = threading.Lock()
        self._over = threading.Event()
        self._thread: threading.Thread | None = None
        self._read_at = time.monotonic()
        self.refresh()

    # -- what a call asks ------------------------------------------------------------------------

    def get(self, identity: str) -> IdentityState | None:
        """As known now; one that is not known may be new, so the database is looked at first.

        Raises Unavailable when the cloud is stopping.
        """
        if self._over.is_set():
            raise stopping()
        if identity not in self._states:
            self._look_again()
        return self._states.get(identity)

    def _look_again(self) -> None:
        """See what another process enrolled just now. Calls that wait together share one look."""
        asked_at = time.monotonic()
        if not self._looking.acquire(timeout=_LOOK_SECONDS):
            return
        try:
            if self._read_at < asked_at:
                self._try()
        finally:
            self._looking.release()

    def mark_used(self, identity: str, generation: int) -> None:
        """A certificate of that generation was used: older ones are retired, from now on."""
        with self._lock:
            state = self._states.get(identity)
            if state is not None and generation > state.used:
                self._mark(identity, state._replace(used=generation))

    def mark_superseded(self, identity: str) -> None:
        """A retired certificate was presented. Noted by day: it makes no more than one write a day."""
        today = int(time.time()) // _DAY * _DAY
        with self._lock:
            state = self._states.get(identity)
            if state is not None and state.superseded != today:
                self._mark(identity, state._replace(superseded=today))

    def _mark(self, identity: str, state: IdentityState) -> None:
        self._states[identity] = self._unwritten[identity] = state

    def put(self, states: Mapping[str, IdentityState]) -> None:
        """What this process has just written. The caller holds the store, so that no refresh is under way."""
        with self._lock:
            for identity, state in states.items():
                self._states[identity] = self._merged(identity, state)

    # -- the database ----------------------------------------------------------------------------

    @property
    def age_seconds(self) -> float:
        """Since the database was last looked at."""
        return time.monotonic() - self._read_at

    def refresh(self) -> None:
        """Read what other processes wrote, and write what is not written yet. Raises Busy, sqlite3.Error."""
        with self._store.held():
            started_at = time.monotonic()
            states = self._store.changed_states()
            if states is not None:
                with self._lock:
                    self._states = {
                        identity: self._merged(identity, state) for identity, state in states.items()
                    }
            self._read_at = started_at
            self._write()

    def _merged(self, identity: str, state: IdentityState) -> IdentityState:
        mark = self._unwritten.get(identity)
        if mark is None:
            return state
        return state._replace(used=max(state.used, mark.used), superseded=mark.superseded)

    def _write(self) -> None:
        with self._lock:
            marks = dict(self._unwritten)
        if not marks:
            return
        with self._store.transaction() as db:
            for identity, mark in marks.items():
                db.execute(
                    "UPDATE devices SET used = max(used, ?), superseded = ? WHERE identity = ?",
                    (mark.used, mark.superseded, identity),
                )
                if mark.used > UNUSED:
                    db.execute("DELETE FROM enrolments WHERE identity = ?", (identity,))
        with self._lock:
            for identity, mark in marks.items():
                if self._unwritten.get(identity) == mark:
                    del self._unwritten[identity]

    # -- the thread ------------------------------------------------------------------------------

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run, name="perfit-identities", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread, and write what is not written yet, where the database lets us."""
        if self._over.is_set():
            return
        self._over.set()
        if self._thread is not None:
            self._thread.join(_STOP_SECONDS)
        self._try()

    def _run(self) -> None:
        is_stale = False
        while not self._over.wait(_REFRESH_SECONDS):
            self._try()
            if is_stale != (self.age_seconds > _STALE_SECONDS):
                is_stale = not is_stale
                if is_stale:
                    _log.error(
                        "the list of devices cannot be read for %.0f s: revocations are not seen, and calls "
                        "go on with what was known; who holds authority.db?",
                        self.age_seconds,
                    )
                else:
                    _log.warning("the list of devices is read again")

    def _try(self) -> None:
        try:
            self.refresh()
        except (PerfitError, sqlite3.Error) as error:
            _log.debug("the list of devices could not be read: %s", type(error).__name__)
