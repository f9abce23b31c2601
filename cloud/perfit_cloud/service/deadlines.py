"""Ends calls that are over their time. One thread serves all; a timer for each would be a thread for each."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from perfit_cloud.engine.errors import error_location

__all__ = ["Deadlines"]

_log = logging.getLogger(__name__)

_LOOK_SECONDS = 0.25  # a cut comes this late at most
_IDLE_SECONDS = 60.0  # with nothing to watch, after which the thread ends until needed again


class Deadlines:
    """Thread-safe."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._watched: dict[object, tuple[float, Callable[[], object]]] = {}  # when to call what
        self._is_running = False

    @contextmanager
    def after(self, seconds: float, cut: Callable[[], object]) -> Iterator[None]:
        """Call `cut`, which must not wait, from another thread, unless the block is left within `seconds`."""
        key = object()
        with self._changed:
            if not self._is_running:  # first, because a system out of threads raises
                threading.Thread(target=self._run, name="perfit-deadlines", daemon=True).start()
                self._is_running = True
            self._watched[key] = (time.monotonic() + seconds, cut)
            if len(self._watched) == 1:
                self._changed.notify()
        try:
            yield
        finally:
            with self._changed:
                self._watched.pop(key, None)

    def _run(self) -> None:
        while self._look():
            time.sleep(_LOOK_SECONDS)

    def _look(self) -> bool:
        """Cut off late calls, in a frame of its own, so that the sleeping thread refers to no call."""
        with self._changed:
            if not self._changed.wait_for(lambda: bool(self._watched), _IDLE_SECONDS):
                self._is_running = False
                return False
            now = time.monotonic()
            late = [key for key, (end, _) in self._watched.items() if end <= now]
            cuts = [self._watched.pop(key)[1] for key in late]
        for cut in cuts:
            try:
                cut()
            except Exception as error:  # the other deadlines go on
                _log.error("a late call could not be cut off: %s", error_location(error))
        return True
