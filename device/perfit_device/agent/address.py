"""Where a profile's agent listens, and whether who is at the other end is this user."""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import stat
import struct
from multiprocessing.connection import Connection
from pathlib import Path

from perfit_device.settings import DeviceSettings
from perfit_shared.errors import ConfigError

__all__ = ["FAMILY", "address_of", "hang_up", "is_same_user"]

FAMILY = "AF_PIPE" if os.name == "nt" else "AF_UNIX"
_LONGEST_PATH = 100  # bytes; the systems' limits are 104 and 108
_LOCAL_PEERCRED = 1  # of macOS's sys/un.h, at level 0: version and uid stand first


def address_of(settings: DeviceSettings, *, make: bool = False) -> str:
    """A socket beside the vault; where that path is too long for one, a socket in a short private folder.

    `make` makes that folder. Raises ConfigError when somebody else could have made it.
    """
    digest = hashlib.sha256(os.fsencode(settings.vault_path.resolve())).hexdigest()[:24]
    if FAMILY == "AF_PIPE":
        return rf"\\.\pipe\perfit-{digest}"
    beside = settings.vault_path.with_name("agent.sock").absolute()
    if len(os.fsencode(beside)) <= _LONGEST_PATH:
        return str(beside)
    folder = settings.runtime_folder
    if make:
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)
    _check_private(folder)
    return str(folder / f"{digest}.sock")


def _check_private(folder: Path) -> None:
    try:
        found = folder.lstat()
    except FileNotFoundError:
        return  # nobody listens there
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise ConfigError(
            f"{folder} should be a folder that is yours alone; remove it, or choose a PERFIT_HOME with a "
            "shorter path"
        )


def is_same_user(connection: Connection) -> bool:
    """Whether a process of this user, or root, is at the other end; True where the system does not tell."""
    if FAMILY == "AF_PIPE":
        return True  # a pipe's default rights let only its owner write
    with socket.socket(fileno=os.dup(connection.fileno())) as plain:
        if hasattr(socket, "SO_PEERCRED"):
            _, uid, _ = struct.unpack("3i", plain.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        elif hasattr(socket, "LOCAL_PEERCRED"):
            _, uid = struct.unpack("II", plain.getsockopt(0, _LOCAL_PEERCRED, 76)[:8])
        else:
            return True
    return uid in (0, os.geteuid())


def hang_up(connection: Connection) -> None:
    """Both sides read its end from now on; it is still to be closed."""
    if FAMILY == "AF_PIPE":
        connection.close()
        return
    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(connection.fileno())) as plain:
        plain.shutdown(socket.SHUT_RDWR)
