"""How the clouds of soaks are set, and as flags of `perfit-cloud serve`."""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["UNDER_LOAD", "flags"]

# Small answers, and no rate that would end a load from one machine. Answers are compared with those of an
# empty cloud, so float32 on every processor: in bfloat16 near ties fall by who shares a pass.
UNDER_LOAD: Mapping[str, object] = {
    "dtype": "float32",
    "new_tokens": 16,
    "threads": 1,
    "requests_minute": 10**6,
    "tokens_minute": 10**9,
    "drain_seconds": 10,
    "enrol_requests_minute": 10**6,
}


def flags(settings: Mapping[str, object]) -> list[str]:
    return [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
