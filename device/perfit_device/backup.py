"""A backup: rows of a vault in one sealed file, with a passphrase of its own.

    "perfit-backup-1\\n"
    4 bytes, header               crypto.Header: Argon2id's cost, salt, and the wrapped key
    4 bytes, wrapped key, sealed  a frame of at most 1 MiB, sealed as the vault seals a row
    …                             the last frame is empty

A frame is bound to its place, so that none can be moved, and the empty one ends the file, so that nothing can
be cut off. What they hold, one behind the other, are rows: 4 bytes, JSON of kind, name and size, the data.
Lengths are big-endian, and bounded before anything is read.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import BinaryIO

from perfit_device.vault.crypto import DataKey, Header, KdfParams, new_key
from perfit_shared.errors import VaultDamaged

__all__ = ["Row", "read", "write"]

_MAGIC = b"perfit-backup-1\n"
_FRAME = 1 << 20  # bytes of what one holds
_OVERHEAD = 16  # bytes that sealing adds
_WRAPPED = 60  # bytes of a wrapped key
_LARGEST_HEADER = 4096
_LARGEST_ROW = 512 << 20
_KIND = "backup"


@dataclass(frozen=True)
class Row:
    kind: str
    name: str
    data: bytes


def write(file: BinaryIO, rows: Iterable[Row], passphrase: str, kdf: KdfParams) -> None:
    """Raises OSError."""
    key = new_key()
    header = Header.create(key, passphrase, kdf)
    sealing = DataKey(key, header.vault_id)
    try:
        data = header.to_bytes()
        file.write(_MAGIC + _length(len(data)) + data)
        number, held = 0, bytearray()
        for row in rows:
            head = json.dumps([row.kind, row.name, len(row.data)]).encode()
            held += _length(len(head)) + head + row.data
            while len(held) >= _FRAME:
                _write_frame(file, sealing, number, bytes(held[:_FRAME]))
                number += 1
                del held[:_FRAME]
        for part in (bytes(held), b"") if held else (b"",):
            _write_frame(file, sealing, number, part)
            number += 1
    finally:
        sealing.wipe()


def _write_frame(file: BinaryIO, sealing: DataKey, number: int, plain: bytes) -> None:
    wrapped, sealed = sealing.seal(_KIND, b"", number, plain)
    file.write(_length(len(sealed)) + wrapped + sealed)


def read(file: BinaryIO, passphrase: str, most: KdfParams) -> Iterator[Row]:
    """Every row, as it is read: whoever acts on them undoes it when this raises.

    Raises WrongPassphrase, VaultDamaged, VaultError where the key derivation costs more than `most`, OSError.
    """
    if file.read(len(_MAGIC)) != _MAGIC:
        raise VaultDamaged("this is no backup of perfit")
    size = int.from_bytes(_exactly(file, 4), "big")
    if size > _LARGEST_HEADER:
        raise _damaged()
    try:
        header = Header.from_bytes(_exactly(file, size), most)
    except VaultDamaged as error:
        raise _damaged() from error
    sealing = DataKey(header.unwrap(passphrase), header.vault_id)
    try:
        yield from _rows(_Plain(file, sealing))
    finally:
        sealing.wipe()


class _Plain:
    """What the frames hold."""

    def __init__(self, file: BinaryIO, sealing: DataKey) -> None:
        self._file, self._sealing = file, sealing
        self._number = 0
        self._held = bytearray()
        self._is_done = False

    def read(self, size: int, *, may_end: bool = False) -> bytes:
        """So many bytes, or none at the end if it `may_end` here. Raises VaultDamaged."""
        while len(self._held) < size and not self._is_done:
            self._next()
        if len(self._held) < size and (self._held or not may_end):
            raise _damaged()
        found = bytes(self._held[:size])
        del self._held[:size]
        return found

    def _next(self) -> None:
        size = int.from_bytes(_exactly(self._file, 4), "big")
        if not _OVERHEAD <= size <= _FRAME + _OVERHEAD:
            raise _damaged()
        wrapped = _exactly(self._file, _WRAPPED)
        try:
            plain = self._sealing.unseal(_KIND, b"", self._number, wrapped, _exactly(self._file, size))
        except VaultDamaged as error:
            raise _damaged() from error
        self._number += 1
        self._held += plain
        if not plain:
            self._is_done = True
            if self._file.read(1):
                raise _damaged()


def _rows(plain: _Plain) -> Iterator[Row]:
    while head := plain.read(4, may_end=True):
        size = int.from_bytes(head, "big")
        if size > _FRAME:
            raise _damaged()
        try:
            kind, name, length = json.loads(plain.read(size))
        except (ValueError, TypeError, RecursionError) as error:
            raise _damaged() from error
        if type(kind) is not str or type(name) is not str or type(length) is not int:
            raise _damaged()
        if not 0 <= length <= _LARGEST_ROW:
            raise _damaged()
        yield Row(kind, name, plain.read(length))


def _exactly(file: BinaryIO, size: int) -> bytes:
    data = file.read(size)
    if len(data) != size:
        raise _damaged()
    return data


def _length(size: int) -> bytes:
    return size.to_bytes(4, "big")


def _damaged() -> VaultDamaged:
    return VaultDamaged("the backup was changed or cut off; nothing was restored")
