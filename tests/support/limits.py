"""A clock that a test sets, buckets, and what a running server says of its queues."""

from __future__ import annotations

from collections.abc import Callable

from perfit_cloud.service.limits import AtOnce, Quota, RateLimiter
from tests.support.cloud import Device, Running


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def rate_limiter(clock: Clock, refused: Callable[[str], None] = lambda _: None, **most: int) -> RateLimiter:
    share = Quota({"calls": 2, "bytes": 100}, {"requests": 60, "tokens": 6000} | most)  # type: ignore[operator]
    return RateLimiter(share, retry_ms=500, refused=refused, clock=clock)


def under_way(running: Running, device: Device, what: AtOnce = "calls") -> int:
    bucket = running.server._listeners.of_devices[0].rate_limiter._buckets.get(device.identity)
    return bucket.held[what] if bucket else 0


def running_line(running: Running) -> float | None:
    return running.server.telemetry.registry.get_sample_value("perfit_waiting", {"line": "gradients"})
