"""Numbers for an operator, in the form that Prometheus reads; docs/operating.md says what each means.

Nothing here says who called or what about: labels are names of RPCs, limits and engines, and values are
counts, seconds, bytes and tokens over everybody.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, ProcessCollector
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from perfit_cloud.engine.interface import Engine, EngineHealth
from perfit_cloud.service.metrics_page import serve_page

__all__ = ["CallOutcome", "Engines", "Telemetry"]

_CALL_SECONDS = (0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 600, 3600)
_PASS_SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 120)


class _Scheduler(Protocol):
    @property
    def scores_waiting(self) -> int: ...

    def health(self) -> EngineHealth: ...


class _UpdateEngine(Protocol):
    def bytes_held(self) -> tuple[int, int]: ...


class _DeviceLock(Protocol):
    on_pass: Callable[[str, float], None]

    def health(self) -> EngineHealth: ...


@dataclass(frozen=True)
class Engines:
    """The engines that are measured and watched."""

    generation: Engine
    scheduler: _Scheduler
    updates: _UpdateEngine
    device_lock: _DeviceLock

    def engine_health(self) -> dict[str, EngineHealth]:
        return {
            "answers": self.generation.health(),
            "updates": self.scheduler.health(),
            "model": self.device_lock.health(),
        }


class CallOutcome:
    """How a call ended: the name of its gRPC status."""

    status = "CANCELLED"  # unless set, the caller left


class Telemetry:
    """The metrics of one server, in a registry of their own."""

    def __init__(self) -> None:
        self._is_serving = self._restart_helps = self._is_draining = False
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        counter, gauge = partial(Counter, registry=registry), partial(Gauge, registry=registry)
        histogram = partial(Histogram, registry=registry)
        self._calls = counter("perfit_calls", "Calls that ended", ["rpc", "status"])
        self._seconds = histogram(
            "perfit_call_seconds", "From a call's headers to its end", ["rpc"], buckets=_CALL_SECONDS
        )
        self._in_flight = gauge("perfit_calls_in_flight", "Calls under way", ["rpc"])
        self._refused = counter("perfit_refused", "Refusals by the limit that was met", ["limit"])
        self._tokens = counter("perfit_tokens", "Tokens read and made", ["kind"])
        self._passes = histogram(
            "perfit_pass_seconds", "Passes on the model's device", ["kind"], buckets=_PASS_SECONDS
        )
        self._info = Info("perfit_cloud", "What is served", registry=registry)
        self._draining = gauge("perfit_draining", "1 from SIGTERM on")
        self._serving = gauge("perfit_serving", "1 while health says SERVING")
        self._days = gauge("perfit_certificate_days_left", "Until it expires", ["certificate"])
        self._callers = gauge("perfit_callers", "Callers with an account just now", ["listener"])
        self._identities_age = gauge(
            "perfit_identities_age_seconds", "Since the list of devices was looked at"
        )
        self._descriptors = gauge(
            "perfit_descriptors", "Files and connections: open, and the limit", ["kind"]
        )
        self._waiting = gauge("perfit_waiting", "Requests in each queue", ["line"])

    # -- what happens --------------------------------------------------------------------------

    @contextmanager
    def call(self, rpc: str) -> Iterator[CallOutcome]:
        """A call under way; whoever handles it says how it ended."""
        outcome, begun = CallOutcome(), time.monotonic()
        in_flight = self._in_flight.labels(rpc)
        in_flight.inc()
        try:
            yield outcome
        finally:
            in_flight.dec()
            self._seconds.labels(rpc).observe(time.monotonic() - begun)
            self._calls.labels(rpc, outcome.status).inc()

    def refused(self, limit: str) -> None:
        self._refused.labels(limit).inc()

    def tokens(self, kind: str, count: int) -> None:
        """`kind`: prompt, answer or example."""
        self._tokens.labels(kind).inc(count)

    def pass_done(self, kind: str, seconds: float) -> None:
        self._passes.labels(kind).observe(seconds)

    def draining(self) -> None:
        self._is_draining = True
        self._draining.set(1)

    def serving(self, *, is_so: bool, restart_helps: bool = False) -> None:
        self._is_serving, self._restart_helps = is_so, restart_helps
        self._serving.set(is_so)

    # -- what is read when somebody looks --------------------------------------------------------

    def describe(self, **info: str) -> None:
        self._info.info(info)

    def certificates(self, ends: Mapping[str, Callable[[], float]]) -> None:
        """When each certificate ends, unix seconds."""
        for name, end in ends.items():
            self._days.labels(name).set_function(partial(_days_left, end))

    def identities(self, age_seconds: Callable[[], float]) -> None:
        self._identities_age.set_function(age_seconds)

    def callers(self, listener: str, count: Callable[[], float]) -> None:
        self._callers.labels(listener).set_function(count)

    def descriptors(self, opened: Callable[[], float], limit: Callable[[], float]) -> None:
        self._descriptors.labels("open").set_function(opened)
        self._descriptors.labels("limit").set_function(limit)

    def line(self, name: str, waiting: Callable[[], float]) -> None:
        self._waiting.labels(name).set_function(waiting)

    def watch(self, engines: Engines) -> None:
        engines.device_lock.on_pass = self.pass_done
        self.registry.register(_OfEngines(engines))

    def serve(self, address: str) -> Callable[[], None]:
        """Serve the page (`metrics_page`) until the function returned is called. Raises ConfigError.

        Ready: new calls are taken. Live: a restart would not help. It helps a server whose engine is dead or
        stuck, unless it stops anyway; not one that waits for the database, since it could not start without.
        """
        return serve_page(
            address,
            self.registry,
            is_ready=lambda: self._is_serving,
            is_live=lambda: not self._restart_helps or self._is_draining,
        )


def _days_left(end: Callable[[], float]) -> float:
    return (end() - time.time()) / 86400


class _OfEngines(Collector):
    def __init__(self, engines: Engines) -> None:
        self._engines = engines

    def collect(self) -> Iterable[Metric]:
        engines = self._engines
        work = GaugeMetricFamily(
            "perfit_engine_work", "Requests or steps in each engine", labels=["engine", "state"]
        )
        stalled = GaugeMetricFamily(
            "perfit_engine_still_seconds", "Without progress while there is work", labels=["engine"]
        )
        alive = GaugeMetricFamily("perfit_engine_alive", "0: its thread is gone", labels=["engine"])
        health_of, scores = engines.engine_health(), engines.scheduler.scores_waiting
        work.add_metric(["scores", "waiting"], scores)
        for name, health in health_of.items():
            # The scheduler's queue holds scores too; it may have changed between the two readings.
            waiting = max(0, health.waiting - scores) if name == "updates" else health.waiting
            work.add_metric([name, "waiting"], waiting)
            work.add_metric([name, "running"], health.running)
            stalled.add_metric([name], health.stalled_seconds)
            alive.add_metric([name], health.is_alive)
        cached = GaugeMetricFamily(
            "perfit_kept_bytes", "Activations cached for updates under way", labels=["where"]
        )
        for where, taken in zip(("device", "host"), engines.updates.bytes_held(), strict=True):
            cached.add_metric([where], taken)
        cache = GaugeMetricFamily(
            "perfit_cache_tokens",
            "Tokens of keys and values set aside for answers under way",
            value=engines.generation.cache_tokens_held,
        )
        return (work, stalled, alive, cached, cache)
