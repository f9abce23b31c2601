"""Wiping a vault: its folder gets another name, then every file of it is overwritten and removed.

From the new name on there is no such profile. What a kill leaves of the folder is wiped by `finish`, which
the commands that add and remove profiles call.

The key goes with the file: rows are sealed by keys that only its header opens. Where a disk writes
elsewhere than it is told (flash, file systems that copy on write), old blocks may stay, sealed.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from perfit_device.vault.crypto import COSTLIEST, forget_keyring_key
from perfit_device.vault.file import WAIT_SECONDS, attach, lock_in_process
from perfit_shared.errors import NotFound, VaultDamaged, VaultError
from perfit_shared.files import sync_folder

__all__ = ["finish", "wipe"]

_PART = bytes(1 << 18)
_GONE = ".removed"  # of a folder's name, behind a dot and the profile's


def wipe(path: Path) -> None:
    """The vault at `path`, and its folder. Raises VaultBusy while a process holds it, VaultError.

    A damaged vault is wiped, too.
    """
    finish(path.parent.parent)
    _wipe(path, path.parent.with_name(f".{path.parent.name}{_GONE}"))


def finish(folder: Path) -> list[str]:
    """Wipe what killed removals left among the profiles of this folder; the profiles' names."""
    left = sorted(folder.glob(f".*{_GONE}"))
    for gone in left:
        _wipe(gone / "vault.db", gone)
    return [gone.name.removeprefix(".").removesuffix(_GONE) for gone in left]


def _wipe(path: Path, gone: Path) -> None:
    """`gone` is the folder's name meanwhile."""
    lock = lock_in_process(path, WAIT_SECONDS)
    try:
        with contextlib.ExitStack() as stack:
            header = None
            with contextlib.suppress(VaultDamaged, NotFound):
                connection, header = attach(path, WAIT_SECONDS, COSTLIEST)
                stack.callback(connection.close)  # it holds the file until it is gone
            path.parent.rename(gone)
            sync_folder(gone.parent)
            if header is not None and header.lock == "keyring":
                forget_keyring_key(header.vault_id)
            # The vault comes first: a kill behind it leaves nothing that opens.
            files = sorted(gone.rglob("*"), key=lambda file: (file.name != path.name, -len(file.parts)))
            for file in files:
                _remove(file)
        gone.rmdir()
    except OSError as error:
        raise VaultError(f"cannot wipe {path.parent}: {error.strerror}; try again") from error
    finally:
        lock.release()


def _remove(file: Path) -> None:
    if file.is_dir() and not file.is_symlink():
        file.rmdir()
        return
    if file.is_file() and not file.is_symlink():
        with file.open("r+b", buffering=0) as opened:
            left = os.fstat(opened.fileno()).st_size
            while left > 0:
                left -= opened.write(_PART[:left]) or 0
            os.fsync(opened.fileno())
    file.unlink(missing_ok=True)
