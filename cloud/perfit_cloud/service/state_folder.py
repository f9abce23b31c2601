"""The state folder: who may write it, where its server is reached, and its lock.

Imports no model, so that `perfit-cloud invite` and a second `serve` answer at once.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

from perfit_shared.errors import ConfigError
from perfit_shared.files import write_whole
from perfit_shared.ownership import check_ownership

__all__ = [
    "DATABASE",
    "DEVICE_CA_CERTIFICATE",
    "SERVER_CA_CERTIFICATE",
    "SERVER_IDENTITY",
    "SERVING",
    "Addresses",
    "check_state",
    "is_served",
    "only_server",
]

_ADDRESSES = "addresses.json"
_LOCK = "serve.lock"
SERVING = "serving.json"  # what the server said at its last start
DATABASE = "authority.db"
DEVICE_CA_CERTIFICATE = "device_ca.crt"  # this and the next two: of processes that do not enrol
SERVER_CA_CERTIFICATE = "server_ca.crt"
SERVER_IDENTITY = "server.pem"
_FILES = (
    "server_ca.pem",
    "device_ca.pem",
    *(f"{ca}_ca.{which}" for ca in ("server", "device") for which in ("next.pem", "last.crt")),
    DEVICE_CA_CERTIFICATE,
    SERVER_CA_CERTIFICATE,
    SERVER_IDENTITY,
    DATABASE,
    f"{DATABASE}-journal",
    f"{DATABASE}-wal",
    f"{DATABASE}-shm",
    "rotation.json",
    _ADDRESSES,
    _LOCK,
    SERVING,
)


def check_state(state: Path, *, trusts_group: bool) -> None:
    """Raises ConfigError when others could change or swap the folder, or a file of ours in it.

    They could issue certificates, or put an authority of theirs in its place.
    """
    try:
        _check(state, trusts_group=trusts_group)
    except ConfigError as error:
        if not trusts_group and _is_fine_for_group(state):
            raise ConfigError(
                f"{error}; or set state_writers=group, if only cloud processes are in it"
            ) from None
        raise


def _check(state: Path, *, trusts_group: bool) -> None:
    check_ownership(state, trusts_group=trusts_group)
    for name in _FILES:
        check_ownership(state / name, trusts_group=trusts_group)


def _is_fine_for_group(state: Path) -> bool:
    try:
        _check(state, trusts_group=True)
    except ConfigError:
        return False
    return True


@dataclass(frozen=True)
class Addresses:
    """host:port that devices dial."""

    address: str  # mutual TLS
    enrol_address: str  # enrolment

    def save(self, state: Path) -> None:
        write_whole(state / _ADDRESSES, json.dumps(asdict(self)).encode(), mode=0o600)

    @classmethod
    def load(cls, state: Path) -> Addresses:
        """Where the server of this state folder was last reached. Raises ConfigError if none ran."""
        try:
            return cls(**json.loads((state / _ADDRESSES).read_text("utf-8")))
        except FileNotFoundError:
            raise ConfigError(
                f"no server has run with the state folder {state}; start `perfit-cloud serve` first, or "
                "name its folder with --state"
            ) from None
        except (OSError, ValueError, TypeError) as error:
            raise ConfigError(f"{state / _ADDRESSES} is damaged; start `perfit-cloud serve` again") from error


def _made(path: Path) -> BinaryIO:
    """Opened for writing; 0600 where it is new, whatever the umask."""
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb")


def is_served(state: Path) -> bool:
    """Whether a server holds the state folder now."""
    try:
        file = (state / _LOCK).open("rb")
    except FileNotFoundError:
        return False
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


@contextmanager
def only_server(state: Path) -> Iterator[None]:
    """Hold the state folder as its only server; the lock ends with the process, however that ends.

    Raises ConfigError when another server holds it.
    """
    with _made(state / _LOCK) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(f"another perfit-cloud serves from {state}; stop it, or give --state") from None
        yield
