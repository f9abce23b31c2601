"""Identities in memory, so that no call waits for the store.

A thread looks twice a second for what other processes wrote (`perfit-cloud revoke`), and sooner where the
store says that there is something; another writes which certificates were used. When the store cannot be
read, the log and a metric say since when, and calls use the last known state: for as long as it takes where
the store is this machine's own file, and for `refuse_after` seconds where a fleet shares one. After a look
that failed the next one reads everything, for the store may be another one by then (a failover, a restored
copy).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from perfit_cloud.service.drain import stopping
from perfit_cloud.service.identity.store import IdentityState, IdentityStore
from perfit_shared.errors import PerfitError, Unavailable

__all__ = ["IdentityCache"]

_log = logging.getLogger(__name__)
_REFRESH_SECONDS = 0.5
_LOOK_SECONDS = 1.0  # that a call of an unknown device waits for the look of another
_STALE_SECONDS = 10.0  # without a look at the store, before the log says so
_ASLEEP_SECONDS = 1.5  # without a try to look: the process was stopped, and what it knows is old
_STOP_SECONDS = 5.0  # for the threads to end when the store is stuck
_DEAF_RETRY_MS = 2000
_DAY = 86400


class IdentityCache:
    """Thread-safe. Without `start`, only `refresh` looks at the store."""

    def __init__(self, store: IdentityStore, *, refuse_after: float | None = None) -> None:
        """`refuse_after`: seconds without a look at the store, after which no call is let in; None: never.

        Raises Busy, StoreFailed.
        """
        self._store, self._refuse_after = store, refuse_after
        self._looking = threading.Lock()  # held while the store is read
        self._lock = threading.Lock()  # held briefly, never while waiting for the store
        self._sequence = 0  # of the changes read last
        self._states: dict[str, IdentityState] = {}
        self._unwritten: dict[str, IdentityState] = {}  # marks not in the store yet
        self._open: dict[object, tuple[str, Callable[[], object]]] = {}  # whose calls, and what ends them
        self._to_end: set[object] = set()  # of these, those whose caller the last look found withdrawn
        self._over = threading.Event()
        self._wake = threading.Event()
        self._threads: list[threading.Thread] = []
        self._read_at = self._tried_at = time.monotonic()
        self.refresh()

    # -- what a call asks ------------------------------------------------------------------------

    def get(self, identity: str) -> IdentityState | None:
        """The last known state. An unknown identity may be new, so this looks at the store first.

        Raises Unavailable when the cloud is stopping, or has not heard of revocations for too long.
        """
        if self._over.is_set():
            raise stopping()
        if identity not in self._states or self._was_asleep():
            self.look()
        if self.is_deaf:
            raise Unavailable(
                "this server has not heard for a while who may call; try again", retry_ms=_DEAF_RETRY_MS
            )
        return self._states.get(identity)

    def _was_asleep(self) -> bool:
        """Whether nobody so much as tried to look for longer than the thread ever waits."""
        return (
            bool(self._threads)
            and time.monotonic() - self._tried_at > _ASLEEP_SECONDS
            and not self._looking.locked()
        )

    @contextmanager
    def watched(self, identity: str, end: Callable[[], object]) -> Iterator[None]:
        """Call `end`, which must not wait, once the identity is withdrawn while the block runs.

        Half a second after that was seen: a call that is sending or receiving ends by itself before, and says
        why.
        """
        key = object()
        with self._lock:
            self._open[key] = (identity, end)
        try:
            yield
        finally:
            with self._lock:
                self._open.pop(key, None)

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

    @property
    def is_deaf(self) -> bool:
        """Whether the store was not looked at for so long that nobody may be let in."""
        return self._refuse_after is not None and self.age_seconds > self._refuse_after

    def refresh(self) -> None:
        """Read what other processes wrote, and write what is not written yet. Raises Busy, StoreFailed."""
        with self._looking:
            self._read()
        self._write()

    def _read(self) -> None:
        """The caller holds `_looking`, so that no older answer comes after a newer one."""
        started_at = self._tried_at = time.monotonic()
        try:
            changes = self._store.changes(self._sequence)
        except BaseException:
            self._sequence = 0
            raise
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

    # -- the threads -----------------------------------------------------------------------------

    def start(self) -> None:
        self._store.on_change(self._wake.set)
        for name, run in (("perfit-identities", self._look_on), ("perfit-marks", self._write_on)):
            self._threads.append(threading.Thread(target=run, name=name, daemon=True))
            self._threads[-1].start()

    def stop(self) -> None:
        """End the threads, and write what is not written yet, if the store allows."""
        if self._over.is_set():
            return
        self._over.set()
        self._wake.set()
        end = time.monotonic() + _STOP_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))
        _trying(self._write)

    def _look_on(self) -> None:
        is_stale = False
        while not self._over.is_set():
            is_woken = self._wake.wait(_REFRESH_SECONDS)
            self._wake.clear()
            self._try_look()
            self._end_withdrawn(is_woken)
            if is_stale != (self.age_seconds > _STALE_SECONDS):
                is_stale = not is_stale
                self._say_stale(is_stale)

    def _write_on(self) -> None:
        """Apart from the looks, so that a write that waits holds up no look."""
        while not self._over.wait(_REFRESH_SECONDS):
            _trying(self._write)

    def _try_look(self) -> None:
        with self._looking:
            _trying(self._read)

    def _end_withdrawn(self, is_woken: bool) -> None:
        """End the calls whose callers were withdrawn at an earlier look, too."""
        with self._lock:
            gone = {
                key: end
                for key, (identity, end) in self._open.items()
                if (state := self._states.get(identity)) is None or state.is_revoked
            }
            ends = [] if is_woken else [end for key, end in gone.items() if key in self._to_end]
            self._to_end = set(gone)
        for end in ends:
            end()

    def _say_stale(self, is_stale: bool) -> None:
        if not is_stale:
            _log.warning("the list of devices is read again")
            return
        then = (
            "calls go on with what was known; who holds authority.db?"
            if self._refuse_after is None
            else f"calls are refused after {self._refuse_after:.0f} s; does the database run?"
        )
        _log.error(
            "the list of devices cannot be read for %.0f s: revocations are not seen, and %s",
            self.age_seconds,
            then,
        )


def _trying(act: Callable[[], None]) -> None:
    try:
        act()
    except PerfitError as error:
        _say(error)


def _say(error: PerfitError) -> None:
    _log.debug("the list of devices could not be read: %s", type(error).__name__)
