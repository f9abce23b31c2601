"""The current personal shifts as answers want them on the wire, as long as the vault is open.

The vault stays the only truth: a copy is good while the row it came from has the same digest.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, NamedTuple

from perfit_device import personal
from perfit_device.vault.crypto import wipe

if TYPE_CHECKING:
    from perfit_device.cloud.codec import Artefact, EncodedShift
    from perfit_device.vault.store import Vault

__all__ = ["EncodedShifts"]

_MOST = 4  # shifts, of 0.8 MB each at 786k numbers


class _Entry(NamedTuple):
    digest: bytes  # of the row in the vault
    artefact: Artefact
    data: bytearray


class EncodedShifts:
    """Several threads may share it. What it lets go of is overwritten first."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._entries: dict[tuple[str, str], _Entry] = {}  # by cloud and artefact, the newest last

    def get(self, vault: Vault, cloud_id: str, artefact: Artefact) -> EncodedShift | None:
        """None when this user has no shift yet. Raises as `personal.load` does."""
        from perfit_device.cloud.codec import ANSWER_DTYPE, EncodedShift

        digest = personal.digest(vault, cloud_id, artefact.name)  # before the rest is read
        key = (cloud_id, artefact.name)
        with self._lock:
            entry = self._entries.get(key)
            if entry is not None and (entry.digest, entry.artefact) == (digest, artefact):
                return EncodedShift(bytes(entry.data))  # a copy, since another thread may overwrite it
        shift = personal.load(vault, cloud_id, artefact)
        if shift is None or digest is None:
            return None
        encoded = EncodedShift(shift.tensors.to_bytes(dtype=ANSWER_DTYPE))
        with self._lock:
            self._drop(key)
            self._entries[key] = _Entry(digest, artefact, bytearray(encoded.data))
            for oldest in list(self._entries)[:-_MOST]:
                self._drop(oldest)
        return encoded

    def drop_changed(self, vault: Vault) -> None:
        """Those that the vault has changed since. It reads no row."""
        with self._lock:
            for (cloud_id, artefact), entry in list(self._entries.items()):
                if personal.digest(vault, cloud_id, artefact) != entry.digest:
                    self._drop((cloud_id, artefact))

    def wipe(self) -> None:
        with self._lock:
            for key in list(self._entries):
                self._drop(key)

    def _drop(self, key: tuple[str, str]) -> None:
        entry = self._entries.pop(key, None)
        if entry is not None:
            wipe(entry.data)
