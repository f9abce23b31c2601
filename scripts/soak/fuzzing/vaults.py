"""Targets in the vault: headers, and files with bytes flipped, cut, swapped or taken from another."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

from hypothesis import strategies as st

from perfit_device.vault.crypto import Header, KdfParams
from perfit_device.vault.store import Vault
from perfit_shared.errors import PerfitError
from soak.fuzzing.checking import Target, Unsound
from soak.fuzzing.mutation import edited, edited_json

__all__ = ["targets"]

_PASSPHRASE = "a passphrase for this run only"  # noqa: S105 - protects nothing
_CHEAP = KdfParams(memory_kib=32, iterations=1, lanes=1)
_CHEAPER_THAN_KIB = 1024  # above this, what the bounds still allow takes longer than all other inputs
_PAGE = 4096
_KINDS = ("shift", "example", "checkpoint")
_Rows = Mapping[tuple[str, str], bytes]


def targets(work: Path) -> list[Target]:
    work.mkdir(parents=True, exist_ok=True)
    # Two vaults, and the first one earlier: what it held then must not come back.
    earlier, journal = _make(work / "one.db", rows=6)
    with Vault.open(work / "one.db", _PASSPHRASE) as vault:
        vault.put("shift", "0", b"a newer version" * 100)
        vault.delete("example", "1")
    other, _ = _make(work / "two.db", rows=9)
    file = _File(work, (work / "one.db").read_bytes())
    header = _Header(_header_of(work / "one.db"))
    inputs = _files([file.sound, earlier, other], journal)
    return [
        Target("vault headers", 5, header.inputs(), header.check),
        Target("vault files", 12, inputs, file.check),
    ]


def _make(path: Path, *, rows: int) -> tuple[bytes, bytes]:
    """The file with some rows, and a hot journal of a change to it that was never finished."""
    with Vault.create(path, _PASSPHRASE, kdf=_CHEAP) as vault:
        for number in range(rows):
            vault.put(_KINDS[number % 3], str(number), bytes([number]) * 700)
        before = path.read_bytes()
        with vault.transaction():
            vault.put("shift", "0", os.urandom(9000))
            journal = path.with_name(path.name + "-journal").read_bytes()  # SQLite wrote it at the spill
    return before, journal


def _header_of(path: Path) -> bytes:
    import sqlite3

    connection = sqlite3.connect(path)
    try:
        return bytes(connection.execute("SELECT data FROM header").fetchone()[0])
    finally:
        connection.close()


# -- headers -------------------------------------------------------------------------------------------


class _Header:
    def __init__(self, sound: bytes) -> None:
        self._sound = sound
        self._key = Header.from_bytes(sound).unwrap(_PASSPHRASE)

    def inputs(self) -> st.SearchStrategy[bytes]:
        # With a right digest too, or nothing behind it would ever be reached.
        hostile = edited_json([json.loads(self._sound[32:])]).map(
            lambda text: text.encode("utf-8", "surrogatepass")
        )
        return hostile.map(_summed) | edited([self._sound])

    def check(self, data: bytes) -> str:
        header = Header.from_bytes(data)
        if header.lock == "keyring":
            return "of a keyring"  # which would be asked
        if header.kdf.memory_kib > _CHEAPER_THAN_KIB or header.kdf.iterations > 3:
            return "dear, within bounds"
        if header.unwrap(_PASSPHRASE) != self._key:
            raise Unsound("a header that opens to another key")
        return "opens"


def _summed(body: bytes) -> bytes:
    return hashlib.sha256(body).digest() + body


# -- files -----------------------------------------------------------------------------------------------


def _files(samples: list[bytes], journal: bytes) -> st.SearchStrategy[tuple[bytes, bytes]]:
    """(vault file, journal beside it; mostly none)."""
    whole = st.integers(0, len(samples) - 1).map(lambda number: samples[number])
    pages = st.lists(st.tuples(st.integers(0, 20), whole, st.integers(0, 20)), min_size=1, max_size=3)
    spliced = st.builds(_swap_pages, whole, pages)
    garbage = st.builds(_fill_page, whole, st.integers(0, 20), st.binary(max_size=64))
    alone = st.one_of(edited(samples), spliced, garbage).map(lambda data: (data, b""))
    return alone | st.tuples(whole, edited([journal]))


def _swap_pages(data: bytes, swaps: list[tuple[int, bytes, int]]) -> bytes:
    out = bytearray(data)
    for to, source, number in swaps:
        page = source[number * _PAGE : (number + 1) * _PAGE]
        out[to * _PAGE : to * _PAGE + len(page)] = page
    return bytes(out)


def _fill_page(data: bytes, number: int, filler: bytes) -> bytes:
    start = number * _PAGE % (len(data) or 1)
    page = (filler or b"\0") * (_PAGE // (len(filler) or 1) + 1)
    return data[:start] + page[:_PAGE] + data[start + _PAGE :]


class _File:
    """Opens what it is given where the sound file lay, with and without the note beside it."""

    def __init__(self, work: Path, sound: bytes) -> None:
        self.sound = sound
        self._path = work / "opened.db"
        self._note = (work / "one.db.sum").read_bytes()
        (work / "sound.db").write_bytes(sound)
        self._rows = _rows_of(work / "sound.db")

    def check(self, files: tuple[bytes, bytes]) -> str:
        data, journal = files
        self._clear()
        self._path.write_bytes(data)
        self._beside(".sum").write_bytes(self._note)
        if journal:
            self._beside("-journal").write_bytes(journal)
        try:
            rows = _rows_of(self._path)
        except PerfitError:
            if not journal and self._path.read_bytes() != data:
                raise Unsound("a vault that would not open was changed") from None
            raise
        if rows == self._rows:
            return "the rows of the sound vault"
        if data == self.sound:
            raise Unsound("a sound vault lost rows to a journal that is not its own")
        # A whole older file opens as what it was: rollback is not detected, docs/security.md says so.
        if not _is_whole(rows):
            raise Unsound("a vault that opens to what nobody put into it")
        return "the rows of another whole vault"

    def _clear(self) -> None:
        for path in self._path.parent.glob(f"{self._path.name}*"):
            path.unlink()

    def _beside(self, suffix: str) -> Path:
        return self._path.with_name(self._path.name + suffix)


def _is_whole(rows: _Rows) -> bool:
    """Whether they are exactly those of a vault that `_make` made, which its first byte tells."""
    count = len(rows)
    return count in (6, 9) and rows == {(_KINDS[n % 3], str(n)): bytes([n]) * 700 for n in range(count)}


def _rows_of(path: Path) -> _Rows:
    with Vault.open(path, _PASSPHRASE, wait_seconds=0) as vault:
        return {(kind, name): data for kind in _KINDS for name, data in vault.list(kind).items()}
