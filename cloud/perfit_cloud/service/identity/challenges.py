"""Challenges (nonces) that a device signs to prove that it holds a key.

A challenge is 32 bytes: the time, random bytes, and a tag over both under a key that all processes of one
cloud share. The tag makes it recognisable without storing it, so asking for challenges fills no memory and
writes only a new key every two minutes. Used challenges are stored, as hashes.

A used challenge stays used whatever the clock does. It is forgotten when its key is dropped, and without
the key nobody accepts it.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time

from perfit_cloud.service.identity.store import ChallengeKey, IdentityStore
from perfit_shared.errors import NotAuthenticated

__all__ = ["Challenges"]

_SECONDS = 60  # that a challenge is valid
_SKEW_SECONDS = 5  # that the clocks of two processes may differ
_KEY_SECONDS = 120  # that a key makes challenges; they are valid while it is the newest or the one before
_HEAD_BYTES = 16  # time and random bytes


class Challenges:
    """Thread-safe. Every process accepts the challenges of the others."""

    def __init__(self, store: IdentityStore) -> None:
        self._store = store
        self._keys: list[ChallengeKey] = []  # as read last, newest first

    def make(self) -> bytes:
        """A fresh challenge. Raises Busy, StoreFailed."""
        now = int(time.time())
        head = now.to_bytes(8, "big") + secrets.token_bytes(_HEAD_BYTES - 8)
        return head + _tag(self._key_of(now), head)

    def use(self, challenge: bytes) -> None:
        """Raises NotAuthenticated unless this cloud made it within 60 s and nobody used it yet."""
        head, tag = challenge[:_HEAD_BYTES], challenge[_HEAD_BYTES:]
        age = time.time() - int.from_bytes(head[:8], "big")
        key = self._find(head, tag) if -_SKEW_SECONDS <= age <= _SECONDS else None
        if key is None:
            raise NotAuthenticated("the challenge has expired; try again")
        if not self._store.use_challenge(key.number, hashlib.sha256(challenge).digest()):
            raise NotAuthenticated("the challenge was used already; try again")

    def _key_of(self, now: int) -> ChallengeKey:
        """The newest key; a new one if that is old, or from the future."""
        keys = self._keys if _is_fresh(self._keys, now) else self._read()
        if not _is_fresh(keys, now):
            after = keys[0].number if keys else 0
            self._store.add_challenge_key(secrets.token_bytes(32), made=now, after=after)
            keys = self._read()  # ours, or that of a faster process
        return keys[0]

    def _find(self, head: bytes, tag: bytes) -> ChallengeKey | None:
        """The key that made the tag. Another process may have added it since the last read."""
        return _made_by(self._keys, head, tag) or _made_by(self._read(), head, tag)

    def _read(self) -> list[ChallengeKey]:
        self._keys = self._store.challenge_keys()
        return self._keys


def _is_fresh(keys: list[ChallengeKey], now: int) -> bool:
    return bool(keys) and abs(now - keys[0].made) < _KEY_SECONDS


def _made_by(keys: list[ChallengeKey], head: bytes, tag: bytes) -> ChallengeKey | None:
    return next((key for key in keys if hmac.compare_digest(_tag(key, head), tag)), None)


def _tag(key: ChallengeKey, head: bytes) -> bytes:
    return hmac.digest(key.key, head, "sha256")[:16]
