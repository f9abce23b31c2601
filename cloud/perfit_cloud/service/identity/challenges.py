"""Nonces that a device signs to prove that it holds a key."""

from __future__ import annotations

import hmac
import secrets
import threading
import time

from perfit_shared.errors import NotAuthenticated

__all__ = ["Challenges"]

_SECONDS = 60


class Challenges:
    """Of one process. Thread-safe."""

    def __init__(self) -> None:
        self._key = secrets.token_bytes(32)
        self._begun = time.monotonic()
        self._lock = threading.Lock()
        self._answered: dict[bytes, float] = {}  # nonces used, until they would lapse anyway

    def make(self) -> bytes:
        """A nonce, 32 bytes: the time, chance, and a tag over both.

        The tag makes it recognisable without being stored, so that asking for nonces fills no memory. The
        time is since the start, by a clock that nobody sets: a nonce that was used stays so.
        """
        head = int(self._now()).to_bytes(8, "big") + secrets.token_bytes(8)
        return head + self._tag(head)

    def spend(self, nonce: bytes) -> None:
        """Raises NotAuthenticated unless we made the nonce within 60 s and it is used for the first time."""
        head, now = nonce[:16], self._now()
        age = now - int.from_bytes(head[:8], "big")
        if not hmac.compare_digest(self._tag(head), nonce[16:]) or not -1 <= age <= _SECONDS:
            raise NotAuthenticated("the challenge has expired; try again")
        with self._lock:
            self._answered = {n: end for n, end in self._answered.items() if end > now}
            if nonce in self._answered:
                raise NotAuthenticated("the challenge was used already; try again")
            self._answered[nonce] = now + _SECONDS + 2

    def _now(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._begun

    def _tag(self, head: bytes) -> bytes:
        return hmac.digest(self._key, head, "sha256")[:16]
