"""How a serving process ends: at a signal it lets calls end and closes what it holds, in bounded time."""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn

from perfit_cloud.config import CloudConfig

if TYPE_CHECKING:
    from perfit_cloud.service.server import CloudServer

__all__ = ["answer_until_stopped", "ends_in_time", "leave", "stop_signals"]

_log = logging.getLogger(__name__)
_WAKE_SECONDS = 0.25  # how long a signal to stop may go unnoticed
_CLOSE_SECONDS = 5.0  # for the engines to end, and again for the database, after the last call
_LAST_SECONDS = 20  # after drain_seconds the system ends the process, if no thread lets Python do it


def stop_signals() -> queue.SimpleQueue[None]:
    """Gets an item at every SIGTERM and SIGINT, from now on."""
    # SimpleQueue.put is reentrant, so it is safe in a signal handler.
    stops: queue.SimpleQueue[None] = queue.SimpleQueue()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stops.put(None))
    return stops


def answer_until_stopped(
    config: CloudConfig, server: CloudServer, stops: queue.SimpleQueue[None], *closes: Callable[[], None]
) -> None:
    """Wait for a signal to stop; then end calls, and call `closes`."""
    try:
        while stops.empty():
            # The system may give the signal to any thread, and its handler waits for this one to wake.
            time.sleep(_WAKE_SECONDS)
    finally:
        signal.alarm(config.drain_seconds + _LAST_SECONDS)
        with contextlib.suppress(queue.Empty):  # the signal that ended the wait is no hurry
            stops.get_nowait()
        all_ended = server.stop(config.drain_seconds, lambda: not stops.empty())
        if not (ends_in_time(*closes) and all_ended):
            _log.warning("what had not ended in time was cut off")


def ends_in_time(*closes: Callable[[], None]) -> bool:
    """Whether these, one after another, end within _CLOSE_SECONDS."""
    thread = threading.Thread(target=lambda: [close() for close in closes], daemon=True)
    thread.start()
    thread.join(_CLOSE_SECONDS)
    return not thread.is_alive()


def leave() -> NoReturn:
    """End the process. Python's own end would first wait for every thread that handles a call."""
    logging.shutdown()
    sys.stdout.flush()
    os._exit(0)
