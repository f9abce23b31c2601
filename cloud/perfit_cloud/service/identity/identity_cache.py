"""Identities in memory, so that no call waits for the store.

A thread looks twice a second for what other processes wrote (`perfit-cloud revoke`), and writes which
certificates were used. When the store cannot be read, calls use the last known state, and the log and a
metric say since when.
"""

from __future__ import annotations

import logging
import threading
import time

from perfit_cloud.service.drain import stopping
from perfit_cloud.service.identity.store import IdentityState, IdentityStore
from perfit_shared.errors import PerfitError

__all__ = ["IdentityCache"]

_log = logging.getLogger(__name__)
_REFRESH_SECONDS = 0.5
_LOOK_SECONDS = 1.0  # that a call of an unknown device waits for the look of another
_STALE_SECONDS = 10.0  # without a look at the store, before the log says so
_STOP_SECONDS = 5.0  # for the thread to end when the store is stuck
_DAY = 86400


class IdentityCache:
    """Thread-safe. Without `start`, only `refresh` looks at the store."""

    def __init__(self, store: IdentityStore) -> None:
        """Raises Busy, StoreFailed."""
        self._store = store
        self._looking = threading.Lock()  # held while the store is read
        self._lock = threading.Lock()  # held briefly, never while waiting for the store
        self._sequence = 0  # of the changes read last
        self._states: dict[str, IdentityState] = {}
        self._unwritten: dict[str, IdentityState] = {}  # marks not in the store yet
        self._over = threading.Event()
        self._thread: threading.Thread | None = None
        self._read_at = time.monotonic()
        self.refresh()

    # -- what a call asks ------------------------------------------------------------------------

    def get(self, identity: str) -> IdentityState | None:
        """The last known state. An unknown identity may be new, so this looks at the store first.

        Raises Unavailable when the cloud is stopping.
        """
        if self._over.is_set():
            raise stopping()
        if identity not in self._states:
            self.look()
        return self._states.get(identity)

    def look(self) -> None:
        """Read the latest changes, if the store allows. Calls that wait together share one look."""
        asked_at = time.monotonic()
        if not self._looking.acquire(timeout=_LOOK_SECONDS):
            return
        try:
            if self._read_at < asked_at:
                self._read()
        except PerfitError as error:
            _say(error)
        finally:
            self._looking.release()

    def mark_used(self, identity: str, generation: int) -> None:
        """Note the use of a certificate of that generation, which retires older ones."""
        with self._lock:
            state = self._states.get(identity)
            if state is not None and generation > state.used:
                self._mark(identity, state._replace(used=generation))

    def mark_superseded(self, identity: str) -> None:
        """Note the day on which a retired certificate was presented: at most one write a day."""
        today = int(time.time()) // _DAY * _DAY
        with self._lock:
            state = self._states.get(identity)
            if state is not None and state.superseded != today:
                self._mark(identity, state._replace(superseded=today))

    def _mark(self, identity: str, state: IdentityState) -> None:
        self._states[identity] = self._unwritten[identity] = state

    # -- the store -------------------------------------------------------------------------------

    @property
    def age_seconds(self) -> float:
        """Since the store was last looked at."""
        return time.monotonic() - self._read_at

    def refresh(self) -> None:
        """Read what other processes wrote, and write what is not written yet. Raises Busy, StoreFailed."""
        with self._looking:
            self._read()
        self._write()

    def _read(self) -> None:
        """The caller holds `_looking`, so that no older answer comes after a newer one."""
        started_at = time.monotonic()
        changes = self._store.changes(self._sequence)
        with self._lock:
            known = {} if changes.is_complete else self._states
            for identity, state in changes.states.items():
                known[identity] = self._merged(identity, state)
            self._states = known
        self._sequence, self._read_at = changes.sequence, started_at

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
        self._store.write_marks(marks)
        with self._lock:
            for identity, mark in marks.items():
                if self._unwritten.get(identity) == mark:
                    del self._unwritten[identity]

    # -- the thread ------------------------------------------------------------------------------

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run, name="perfit-identities", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread, and write what is not written yet, if the store allows."""
        if self._over.is_set():
            return
        self._over.set()
        if self._thread is not None:
            self._thread.join(_STOP_SECONDS)
        self._try_refresh()

    def _run(self) -> None:
        is_stale = False
        while not self._over.wait(_REFRESH_SECONDS):
            self._try_refresh()
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

    def _try_refresh(self) -> None:
        try:
            self.refresh()
        except PerfitError as error:
            _say(error)


def _say(error: PerfitError) -> None:
    _log.debug("the list of devices could not be read: %s", type(error).__name__)
