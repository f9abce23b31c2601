"""The limits of one server: they say when to retry as it is set, and telemetry counts whom they refuse."""

from __future__ import annotations

from perfit_cloud.service.limits import AMinute, AtOnce, Budget, ConcurrencyLimit, Quota, RateLimiter
from perfit_cloud.service.telemetry import Telemetry

__all__ = ["LimitFactory"]

# Before the names of a listener's limits, in what telemetry counts; others have the listener's own name.
_PREFIXES = {"devices": "", "enrolment": "enrol_"}


class LimitFactory:
    """Makes them. `name` is what telemetry calls a limit."""

    def __init__(self, telemetry: Telemetry, *, retry_ms: int) -> None:
        self._telemetry, self._retry_ms = telemetry, retry_ms

    def concurrency(self, name: str, slots: int) -> ConcurrencyLimit:
        """Of what all callers have under way."""
        return ConcurrencyLimit(name, slots=slots, retry_ms=self._retry_ms, refused=self._telemetry.refused)

    def budget(self, name: str, size: int) -> Budget:
        """Of `size` bytes for all callers together."""
        return Budget(name, size, retry_ms=self._retry_ms, refused=self._telemetry.refused)

    def rates(self, listener: str, at_once: dict[AtOnce, int], a_minute: dict[AMinute, int]) -> RateLimiter:
        """Of what each caller of a listener may take; telemetry counts its callers, too."""
        prefix = _PREFIXES.get(listener, f"{listener}_")
        rate_limiter = RateLimiter(
            Quota(at_once, a_minute),
            retry_ms=self._retry_ms,
            refused=lambda limit: self._telemetry.refused(prefix + limit),
        )
        self._telemetry.callers(listener, lambda: len(rate_limiter))
        return rate_limiter
