"""A7: somebody holds the cloud's database, and a device renews its certificate again and again.

    PYTHONPATH=scripts .venv/bin/python -m soak.attacking.database --seconds 20 --json database.json

The database is held by another process for most of the time, as by a backup that hangs. Each renewal then
waits for it inside the server, and every call of every device waited behind it.
"""

from __future__ import annotations

import sqlite3
import sys
import threading
from pathlib import Path

import psutil

from perfit_device.cloud.identity import Identity
from perfit_shared.wire import enrollment_pb2
from soak.attacking.common import Attack, Attacker, main

__all__ = ["ATTACKS"]

_HELD_SECONDS = 30.0
_holding = threading.Lock()


def hold_and_renew(attacker: Attacker) -> None:
    """One thread holds the database, the others renew."""
    if _holding.acquire(blocking=False):
        try:
            _hold(attacker)
        finally:
            _holding.release()
        return
    request = enrollment_pb2.RenewRequest(csr=Identity.create().csr())
    attacker.call("/perfit.v1.Identity/Renew", request.SerializeToString())


def _hold(attacker: Attacker) -> None:
    command = psutil.Process(attacker.pid).cmdline()
    database = Path(command[command.index("--state") + 1]) / "authority.db"
    other = sqlite3.connect(database, isolation_level=None, timeout=30)
    try:
        other.execute("BEGIN EXCLUSIVE")
        attacker.count("held")
        attacker.is_over.wait(_HELD_SECONDS)
    finally:
        other.close()


ATTACKS = [Attack("A7 database held", hold_and_renew, threads=3)]


if __name__ == "__main__":
    sys.exit(main(__doc__, ATTACKS))
