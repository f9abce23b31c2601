"""Connections to one cloud: which address comes next, and when a channel that was left closes.

A cloud may have several addresses, and behind each of them several replicas. A device begins at one of
them by chance. A connection that failed is left: the next call goes over a new one, to the next address, or
through the balancer to another replica. Calls that run on the old one go on to their end.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterable
from typing import Any

import grpc

from perfit_device.cancellation import pause
from perfit_device.cloud.channels import shuffled
from perfit_device.cloud.identity import Enrolment
from perfit_device.cloud.sealed_channel import opened_channel
from perfit_device.cloud.sealing import Sealing
from perfit_shared.wire import personalization_pb2 as pb
from perfit_shared.wire import personalization_pb2_grpc as services

__all__ = ["Connection", "Connections"]

FetchKeys = Callable[[grpc.Channel], Iterable[pb.SealingKey]]  # of the server behind a channel, in the clear
_SPREAD_SECONDS = 0.3  # at most, before a call goes over another connection than the last


class Connection:
    """A channel to one address. Once it is left, it closes behind its last call."""

    def __init__(self, enrolment: Enrolment, address: str, sealing: Sealing | None, keys: FetchKeys) -> None:
        self.address = address
        self.channel, self.sealer = opened_channel(enrolment, address, sealing, keys)
        self.stub: Any = services.PersonalizationStub(self.channel)
        self._lock = threading.Lock()
        self._calls, self._is_left = 0, False

    @property
    def is_busy(self) -> bool:
        return self._calls > 0

    def prepare(self) -> None:
        """Have a key to seal to, while the wait for it can be interrupted. Raises as `Sealer.key`."""
        if self.sealer is not None:
            self.sealer.key()

    def begin(self) -> None:
        with self._lock:
            self._calls += 1

    def end(self) -> None:
        with self._lock:
            self._calls -= 1
            is_over = self._is_left and not self._calls
        if is_over:  # perhaps in a thread of the channel's own, which should not close it
            threading.Thread(target=self.channel.close, daemon=True).start()

    def leave(self) -> None:
        """It gets no more calls."""
        with self._lock:
            self._is_left = True
            is_over = not self._calls
        if is_over:
            self.channel.close()


class Connections:
    """The one for new calls, and those that were left. Thread-safe."""

    def __init__(self, sealing: Sealing | None, keys: FetchKeys) -> None:
        """With `sealing` each seals to keys of its own, which `keys` asks for: it may reach another."""
        self._sealing, self._keys = sealing, keys
        self._lock = threading.Lock()
        self._all: list[Connection] = []  # the last is for new calls
        self._enrolment: Enrolment
        self._next: list[str] = []  # addresses
        self._has_moved = False

    def renew(self, enrolment: Enrolment) -> Connection:
        """With this certificate from now on."""
        with self._lock:
            self._enrolment, self._next = enrolment, []  # the cloud may have said other addresses
            return self._connect()

    def move(self, failed: Connection) -> None:
        """New calls go elsewhere. Harmless for one that was left before."""
        with self._lock:
            if self._all and self._all[-1] is failed:
                self._connect()
                self._has_moved = True

    def for_call(self) -> Connection:
        """The connection for a new call, which has begun on it; whoever calls says when it ends."""
        with self._lock:
            has_moved, self._has_moved = self._has_moved, False
        if has_moved:  # many devices may have lost the same replica at this moment
            pause(random.uniform(0, _SPREAD_SECONDS))  # noqa: S311
        with self._lock:
            self._all[-1].begin()
            return self._all[-1]

    def close(self) -> None:
        """Ends every call."""
        with self._lock:
            for each in self._all:
                each.channel.close()

    def _connect(self) -> Connection:
        self._next = self._next or shuffled(self._enrolment.address)
        connection = Connection(self._enrolment, self._next.pop(), self._sealing, self._keys)
        for old in self._all:
            old.leave()
        self._all = [*(old for old in self._all if old.is_busy), connection]
        return connection
