"""A4: connections that never say a byte, to either port, opened again as soon as they are closed.

PYTHONPATH=scripts .venv/bin/python -m soak.attacking.silent --json silent.json

The server starts with 1,024 descriptors, as most systems start one. Afterwards the time is told after which
somebody new was answered on the enrolment port while the attack went on.
"""

from __future__ import annotations

import resource
import select
import socket
import sys
import time
from contextlib import suppress

from soak.attacking.common import Attack, Attacker, main

__all__ = ["ATTACKS"]

_CONNECTIONS = 1_100
_SERVERS_DESCRIPTORS = 1_024


def hold(address: str, attacker: Attacker) -> None:
    """Hold as many as may be, until the attack is over."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    host, port = address.rsplit(":", 1)
    held: dict[int, socket.socket] = {}
    poll = select.poll()
    while not attacker.is_over.is_set():
        while len(held) < _CONNECTIONS and not attacker.is_over.is_set():
            try:
                one = socket.create_connection((host, int(port)), 2)
            except OSError as error:
                attacker.count(type(error).__name__)
                break
            attacker.count("opened")
            held[one.fileno()] = one
            poll.register(one, select.POLLIN)
        for descriptor, _ in poll.poll(200):
            attacker.count("closed by the server")
            poll.unregister(descriptor)
            with suppress(OSError):
                held.pop(descriptor).close()
        time.sleep(0.1)
    for one in held.values():
        one.close()


def silent_at_enrolment(attacker: Attacker) -> None:
    hold(attacker.enrolment.enrolment_address, attacker)


def silent_at_devices(attacker: Attacker) -> None:
    hold(attacker.enrolment.address, attacker)


ATTACKS = [
    Attack("A4 silent connections to enrol", silent_at_enrolment, threads=1),
    Attack("A4 silent connections of devices", silent_at_devices, threads=1),
]

if __name__ == "__main__":
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (_SERVERS_DESCRIPTORS, most))
    sys.exit(main(__doc__, ATTACKS))
