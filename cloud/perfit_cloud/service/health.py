"""The health service: NOT_SERVING while an engine is stuck or dead, and once the cloud stops."""

from __future__ import annotations

import logging
import threading

from grpc_health.v1 import health, health_pb2

from perfit_cloud.service.telemetry import Engines, Telemetry

__all__ = ["HealthMonitor"]

_log = logging.getLogger(__name__)
_LOOK_SECONDS = 5.0  # between two looks; less where an engine counts as stuck sooner
_ALWAYS = ("perfit.v1.Identity", "perfit.v1.Enrollment")  # need no engine
_MODEL = ("", "perfit.v1.Personalization")


class HealthMonitor:
    """Runs the health service and watches the engines."""

    def __init__(self, engines: Engines | None, telemetry: Telemetry, *, stuck_seconds: float) -> None:
        self.health = health.HealthServicer()
        self._engines, self._telemetry, self._stuck_seconds = engines, telemetry, stuck_seconds
        self._over = threading.Event()
        self._is_well = True
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
            if self._engines is not None:
                self._look(self._engines)

    def _look(self, engines: Engines) -> None:
        ill = [
            f"{name} ({'stuck' if health.is_alive else 'dead'})"
            for name, health in engines.engine_health().items()
            if not health.is_alive or health.stalled_seconds > self._stuck_seconds
        ]
        if bool(ill) != self._is_well:
            return
        self._is_well = not ill
        if ill:
            _log.error("health says NOT_SERVING: %s", ", ".join(ill))
        else:
            _log.warning("health says SERVING again")
        state = health_pb2.HealthCheckResponse.NOT_SERVING if ill else health_pb2.HealthCheckResponse.SERVING
        for service in _MODEL:
            self.health.set(service, state)
        self._telemetry.serving(is_so=self._is_well and not self._over.is_set())
