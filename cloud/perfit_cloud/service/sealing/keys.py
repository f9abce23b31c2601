"""The keys of this process that calls are sealed to: made, certified and replaced in time.

A key is used for half of its life and taken until the end of it, so a device that heard of one may use it for
a while, and several are published at once. Keys live in memory alone: with the process they are gone, and so
is the means to open what was sealed to them.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from perfit_shared.errors import ConfigError, PerfitError
from perfit_shared.sealing.keys import PrivateSealingKey, PublicSealingKey, is_key_id
from perfit_shared.wire import personalization_pb2 as pb

__all__ = ["Attester", "Certify", "ReplicaKeys"]

_log = logging.getLogger(__name__)
_ID_BYTES = 8
_AGAIN_SECONDS = 10.0  # from one try to have a key certified to the next
_WAIT_SECONDS = 10.0  # for a key, where there is none that holds
# (key, its id, life in seconds) → the server CA's certificate, DER
Certify = Callable[[PublicSealingKey, str, int], bytes]


class Attester(Protocol):
    """Whatever can report on the machine that holds a key. perfit has none of its own yet."""

    def evidence(self, binding: bytes) -> bytes:
        """A report bound to `PublicSealingKey.binding`, for the device's `EvidenceVerifier`."""
        ...


@dataclass(frozen=True, repr=False)
class _Key:
    key_id: str
    private: PrivateSealingKey
    published: pb.SealingKey
    made: float  # by the monotonic clock, as all times here


class ReplicaKeys:
    """Thread-safe."""

    def __init__(
        self,
        certify: Certify,
        *,
        life_seconds: int,
        replica: str = "",
        attester: Attester | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`replica`: stands in front of key ids, so that a front's rules can name it.

        Waits for the first key to be certified; the next ones are made in a thread, so that no call waits for
        whoever certifies. Raises ConfigError where `replica` cannot stand there, and what `certify` raises.
        """
        if replica and not (is_key_id(replica) and len(replica) <= 32 and "." not in replica):
            raise ConfigError("sealing_replica should be at most 32 letters, digits, dashes or underscores")
        self._certify, self._life, self._attester, self._clock = certify, life_seconds, attester, clock
        self._replica = f"{replica}." if replica else ""
        self._lock = threading.Lock()
        self._keys: list[_Key] = [self._made()]  # the newest first
        self._making: threading.Thread | None = None  # the next key; who certifies it may be far away
        self._next_try = 0.0

    def published(self) -> list[pb.SealingKey]:
        """Those that may be used now, the newest first."""
        making = self._roll()
        if making is not None and self._clock() - self._keys[0].made >= self._life:
            making.join(_WAIT_SECONDS)  # nothing was asked for so long that there is no other key
        with self._lock:
            return [key.published for key in self._keys]

    def get(self, key_id: str) -> PrivateSealingKey | None:
        self._roll()
        with self._lock:
            return next((key.private for key in self._keys if key.key_id == key_id), None)

    def _roll(self) -> threading.Thread | None:
        """Forget keys whose life is over; what makes the next key, when it is time."""
        with self._lock:
            now = self._clock()
            self._keys = [key for key in self._keys if now - key.made < self._life] or self._keys[:1]
            is_due = now - self._keys[0].made >= self._life / 2 and now >= self._next_try
            if is_due and (self._making is None or not self._making.is_alive()):
                self._next_try = now + _AGAIN_SECONDS
                self._making = threading.Thread(
                    target=self._make_next, name="perfit-sealing-key", daemon=True
                )
                self._making.start()
            return self._making

    def _make_next(self) -> None:
        try:
            made = self._made()  # without the lock: calls go on with the keys that there are
        except PerfitError as error:
            _log.warning("no new sealing key: %s; the last one stays in use", error)
            return
        with self._lock:
            self._keys.insert(0, made)

    def _made(self) -> _Key:
        private = PrivateSealingKey.generate()
        key_id, public = self._replica + secrets.token_hex(_ID_BYTES), private.public
        published = pb.SealingKey(
            certificate=self._certify(public, key_id, self._life),
            evidence=b"" if self._attester is None else self._attester.evidence(public.binding),
        )
        return _Key(key_id, private, published, self._clock())
