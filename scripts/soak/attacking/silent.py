"""A4: connections that never say a byte, to either port, opened again as soon as they are closed.

PYTHONPATH=scripts .venv/bin/python -m soak.attacking.silent --json silent.json

The server starts with 1,024 descriptors, as most systems start one. The honest device connects anew for every
question, which is what the attack keeps it from.
"""

from __future__ import annotations

import resource
import select
import socket
import sys
import time
from contextlib import suppress

import grpc

from perfit_device.cloud.channels import mutual_channel
from perfit_device.cloud.client import Cloud
from perfit_shared.errors import Unavailable
from perfit_shared.wire import personalization_pb2 as pb
from perfit_shared.wire.personalization_pb2_grpc import PersonalizationStub
from soak.attacking.common import Attack, Attacker, main

__all__ = ["ATTACKS"]

_CONNECTIONS = 1_100
_SERVERS_DESCRIPTORS = 1_024
_PATIENCE = 15.0  # seconds of the honest device with one question


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


def connect_anew(honest: Cloud) -> None:
    with mutual_channel(honest.enrolment, honest.enrolment.address) as channel:
        try:
            PersonalizationStub(channel).Describe(pb.DescribeRequest(), timeout=_PATIENCE)
        except grpc.RpcError as error:
            raise Unavailable(error.code().name) from None  # type: ignore[attr-defined]


ATTACKS = [
    Attack("A4 silent connections to enrol", silent_at_enrolment, threads=1, honest=connect_anew),
    Attack("A4 silent connections of devices", silent_at_devices, threads=1, honest=connect_anew),
]

if __name__ == "__main__":
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (_SERVERS_DESCRIPTORS, most))
    sys.exit(main(__doc__, ATTACKS))
