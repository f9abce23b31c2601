"""The health service.

NOT_SERVING while an engine is stuck or dead, while nobody is let in because the store of identities is away,
and once the cloud stops. A restart helps engines alone: without the store a server could not even start.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from grpc_health.v1 import health, health_pb2

from perfit_cloud.service.telemetry import Engines, Telemetry

__all__ = ["HealthMonitor"]

_log = logging.getLogger(__name__)
_LOOK_SECONDS = 5.0  # between two looks; less where an engine counts as stuck sooner
_ALWAYS = ("perfit.v1.Identity", "perfit.v1.Enrollment")  # need no engine
_MODEL = ("", "perfit.v1.Personalization")


class HealthMonitor:
    """Runs the health service and watches the engines."""

    def __init__(
        self,
        engines: Engines | None,
        telemetry: Telemetry,
        *,
        stuck_seconds: float,
        is_deaf: Callable[[], bool] = lambda: False,
    ) -> None:
        self.health = health.HealthServicer()
        self._engines, self._telemetry, self._stuck_seconds = engines, telemetry, stuck_seconds
        self._is_deaf = is_deaf
        self._over = threading.Event()
        self._ill: list[str] = []
        self._thread = threading.Thread(target=self._run, name="perfit-watch", daemon=True)

    def start(self) -> None:
        for service in (*_ALWAYS, *_MODEL):
            self.health.set(service, health_pb2.HealthCheckResponse.SERVING)
        self._telemetry.serving(is_so=True)
        self._thread.start()

    def stop(self) -> None:
        """NOT_SERVING for good."""
        self._over.set()
        self.health.enter_graceful_shutdown()
        self._telemetry.serving(is_so=False)

    def _run(self) -> None:
        while not self._over.wait(min(_LOOK_SECONDS, self._stuck_seconds / 4)):
            self._look()

    def _look(self) -> None:
        ill = engines = self._engines_ill()
        if self._is_deaf():
            ill = [*engines, "the list of devices (away)"]
        if ill == self._ill:
            return
        self._ill = ill
        if ill:
            _log.error("health says NOT_SERVING: %s", ", ".join(ill))
        else:
            _log.warning("health says SERVING again")
        state = health_pb2.HealthCheckResponse.NOT_SERVING if ill else health_pb2.HealthCheckResponse.SERVING
        for service in _MODEL:
            self.health.set(service, state)
        self._telemetry.serving(is_so=not ill and not self._over.is_set(), restart_helps=bool(engines))

    def _engines_ill(self) -> list[str]:
        engines = {} if self._engines is None else self._engines.engine_health()
        return [
            f"{name} ({'stuck' if health.is_alive else 'dead'})"
            for name, health in engines.items()
            if not health.is_alive or health.stalled_seconds > self._stuck_seconds
        ]
