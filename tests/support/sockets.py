"""TCP sockets of processes, as /proc tells of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from perfit_cloud.audit.memory import processes_of

__all__ = ["LOOPBACK", "listening", "reached"]

LOOPBACK = {"0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F"}
_LISTEN = "0A"


def listening(pid: int) -> set[str]:
    """Addresses, as /proc/net has them, on which the process and its descendants listen."""
    return {local for local, _, state in _sockets(pid) if state == _LISTEN}


def reached(pid: int) -> set[str]:
    """Addresses that they are connected to, or try to be."""
    return {remote for _, remote, state in _sockets(pid) if state != _LISTEN}


def _sockets(pid: int) -> Iterator[tuple[str, str, str]]:
    """Local and remote address and state of each."""
    held = set()
    for process in processes_of(pid):
        for link in Path(f"/proc/{process}/fd").iterdir():
            if link.is_symlink():  # what listed them is closed again
                held.add(str(link.readlink()))
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text("ascii").splitlines()[1:]:
            fields = line.split()
            if f"socket:[{fields[9]}]" in held:
                local, remote = (field.partition(":")[0] for field in fields[1:3])
                yield local, remote, fields[3]
