"""Open files and connections: how many there may be, and how many of them are whose.

A connection takes a descriptor before its caller is known. So each listener has a limit of its own. Both fit
under the system's limit, beside what the process itself needs.
"""

from __future__ import annotations

import logging
import resource
import select
from typing import NamedTuple

__all__ = ["Connections", "descriptor_limit", "open_descriptors", "raise_descriptor_limit"]

_log = logging.getLogger(__name__)

_OWN = 256  # descriptors of libraries, the database, the model's files and what the system opens in between
_MOST = 2**20  # where the system has no limit


def descriptor_limit() -> int:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _MOST if soft == resource.RLIM_INFINITY else soft


def raise_descriptor_limit() -> None:
    """As far as the process may by itself: many systems start it with 1,024 and allow far more."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


class Connections(NamedTuple):
    """The most that each listener has at once."""

    devices: int
    enrolment: int

    def within(self, descriptors: int, each: int = 1) -> Connections:
        """As many as fit under the system's limit, `each` taking so many; warns where these do not."""
        room = max(16, (descriptors - _OWN) // each)
        if self.devices + self.enrolment <= room:
            return self
        enrolment = min(self.enrolment, room // 8)
        fitting = Connections(room - enrolment, enrolment)
        _log.warning(
            "this process may have %d files and connections open, too few for the %d and %d connections "
            "that are set; it takes %d of devices and %d for enrolment; raise the limit (ulimit -n, "
            "LimitNOFILE)",
            descriptors,
            *self,
            *fitting,
        )
        return fitting


def open_descriptors() -> int:
    """How many are open. A process that is not dumpable may not read its own /proc, so this asks poll()."""
    found, first, step = 0, 0, min(4096, descriptor_limit())  # poll() takes no more than the limit
    while first < descriptor_limit():
        poll = select.poll()
        for descriptor in range(first, first + step):
            poll.register(descriptor, 0)
        closed = sum(bool(event & select.POLLNVAL) for _, event in poll.poll(0))
        found, first = found + step - closed, first + step
        if closed == step:  # the lowest free number is given out first
            break
    return found
