"""A3: calls that are refused, as many as can be made.

PYTHONPATH=scripts .venv/bin/python -m soak.attacking.refused --json refused.json
"""

from __future__ import annotations

import sys
import time

from local import LocalCloud
from perfit_device.cloud.identity import Enrolment, identity_in
from soak.attacking.common import Attack, Attacker, main

__all__ = ["ATTACKS"]

_HEARD_SECONDS = 30.0  # far more than a server needs


def describe(attacker: Attacker) -> None:
    attacker.call("Describe", b"")


def nothing(attacker: Attacker) -> None:
    attacker.call("Nothing", b"")


def no_messages(attacker: Attacker) -> None:
    attacker.call("Score", b"\x0b" * 1_000_000, compress=True)


def enrol_nothing(attacker: Attacker) -> None:
    attacker.call("/perfit.v1.Enrollment/Nothing", b"", channel=attacker.enrol_channel)


def revoke(cloud: LocalCloud, enrolment: Enrolment) -> None:
    """Revoke, and wait until the server has heard: it looks at its database twice a second."""
    cloud.revoke(identity_in(enrolment.certificate))
    attacker = Attacker(enrolment, 0)
    deadline = time.monotonic() + _HEARD_SECONDS
    while attacker.call("Describe", b"") == "OK":
        if time.monotonic() > deadline:
            raise TimeoutError("a revoked device still gets answers")
        time.sleep(0.1)
    attacker.channel.close()
    attacker.enrol_channel.close()


ATTACKS = [
    Attack("A3 calls of a revoked device", describe, threads=8, prepare=revoke, is_legal_after=False),
    Attack("A3 methods that are none", nothing, threads=8),
    Attack("A3 messages that are none", no_messages, threads=8),
    Attack("A3 methods that are none, enrolling", enrol_nothing, threads=8),
]

if __name__ == "__main__":
    sys.exit(main(__doc__, ATTACKS))
