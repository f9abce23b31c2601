"""What an agent does without being asked: it locks itself when idle, and trains what is due before that.

Updates are looked at every ten minutes and before the idle lock, in a thread of their own.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Protocol

from perfit_device.agent import codec
from perfit_device.config import Config
from perfit_device.operations.automatic import AutomaticUpdates, Holder
from perfit_device.settings import DeviceSettings
from perfit_shared.errors import PerfitError

__all__ = ["Timer"]

_UPDATE_SECONDS = 600.0  # between two looks at whether an update is due


class IdleHolder(Holder, Protocol):
    """The agent."""

    settings: DeviceSettings

    def is_idle(self) -> bool:
        """Whether it is unlocked, and unused for so long that it should lock itself."""

    def lock_if_idle(self) -> None: ...


class Timer:
    """`look` is called every few seconds, and never waits."""

    def __init__(self, agent: IdleHolder, *, now: Callable[[], float], log: Callable[[str], None]) -> None:
        self._agent = agent
        self._now = now
        self._log = log
        self._last = now()
        self._updating = threading.Thread()  # not started, so not alive

    def look(self) -> None:
        """Start to see what is due, where it is time."""
        is_time = self._agent.is_idle() or self._now() - self._last >= _UPDATE_SECONDS
        if is_time and not self._updating.is_alive():
            self._last = self._now()
            self._updating = threading.Thread(target=self._update, name="updates", daemon=True)
            self._updating.start()

    def wait(self) -> None:
        """For the end of what `look` started."""
        if self._updating.is_alive():
            self._updating.join()

    def _update(self) -> None:
        try:
            config = Config.read(self._agent.settings.config_path)  # as it is now
            updates = AutomaticUpdates(
                self._agent, enabled=config.update_auto, by_keyring=config.update_unlock_by_keyring
            )
            for decision in updates.wake():
                if decision.trained:
                    self._log(f"trained by itself: {'accepted' if decision.accepted else 'kept out'}")
        except (PerfitError, OSError, KeyboardInterrupt) as error:  # the next look goes on
            self._log(f"an update by itself ended: {codec.place_of(error)}")
        finally:
            self._agent.lock_if_idle()
