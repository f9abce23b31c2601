"""Disks that fill, fail, forget or cannot be written: the old state, the new one, or one clear error."""

from __future__ import annotations

import random
import shutil
import sqlite3
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.support.limited import run_limited
from tests.support.vaults import CHEAP, PASSPHRASE, change, contents

from perfit_device.vault.store import Vault
from perfit_shared.errors import VaultDamaged, VaultError, VaultUnswept

_SECTOR = 512


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A vault of some pages: 30 examples and a shift."""
    rng = random.Random(1)
    path = tmp_path / "vault.db"
    with Vault.create(path, PASSPHRASE, kdf=CHEAP) as vault, vault.transaction():
        for n in range(30):
            vault.put("example", f"e{n}", rng.randbytes(rng.randrange(10, 600)))
        vault.put("shift", "cloud/task", rng.randbytes(20_000))
    return path


# -- at every byte -----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("how", ["killed", "refused"])
def test_writing_ends_at_any_byte(path: Path, tmp_path: Path, how: str) -> None:
    """No file may grow beyond a limit: the process dies in the middle of a write, or is refused it."""
    rng = random.Random(2)
    limits = [rng.randrange(start, start + 3000) for start in range(0, 130_000, 3000)]
    before = contents(path)
    gone = _parts(path)
    source = tmp_path / "source"
    source.mkdir()
    for name in ("vault.db", "vault.db.sum"):
        shutil.copy(path.with_name(name), source)
    vaults, told = run_limited(f"{__name__}:change", source, tmp_path / "work", how=how, limits=limits)
    change(path)
    after = contents(path)
    olds = news = 0
    for limit, found in zip(limits, vaults, strict=True):
        now = contents(found)
        olds, news = olds + (now == before), news + (now == after)
        assert now in (before, after), limit
        kept = _parts(found)
        for file in found.parent.iterdir():
            data = file.read_bytes()
            assert not any(part in data for part in gone - kept), (limit, file.name)
        # A journal that was not whole yet is left alone until the next change: all in it is in the vault.
        with Vault.open(found, PASSPHRASE) as vault:
            vault.put("other", "last", b"x")
        assert sorted(f.name for f in found.parent.iterdir()) == ["status", "vault.db", "vault.db.sum"]
    assert olds > 5 and news > 5, "or the limits hit one side of the change alone"
    assert bool(told) == (how == "refused")
    for line in told:
        assert "nothing was changed" in line or "the change is made" in line


def _parts(path: Path) -> set[bytes]:
    """Pieces of 16 bytes of every sealed row."""
    connection = sqlite3.connect(path)
    rows = [row[0] for row in connection.execute("SELECT sealed FROM rows")]
    connection.close()
    return {row[at : at + 16] for row in rows for at in range(0, len(row) - 15, 64)}


# -- power lost --------------------------------------------------------------------------------


def journal(before: bytes, page_size: int = 4096) -> bytes:
    """SQLite's rollback journal of a change to all pages (sqlite.org/fileformat2.html)."""
    count, nonce = len(before) // page_size, 77
    head = bytes.fromhex("d9d505f920a163d7") + struct.pack(">5I", count, nonce, count, _SECTOR, page_size)
    records = []
    for number in range(count):
        page = before[number * page_size : (number + 1) * page_size]
        check = (nonce + sum(page[at] for at in range(page_size - 200, 0, -200))) % 2**32
        records.append(struct.pack(">I", number + 1) + page + struct.pack(">I", check))
    return head.ljust(_SECTOR, b"\0") + b"".join(records)


@pytest.fixture
def states(path: Path) -> tuple[bytes, bytes]:
    """The file before a change and after it."""
    before = path.read_bytes()
    change(path)
    after = path.read_bytes()
    path.write_bytes(before)
    return before, after


def mixed(before: bytes, after: bytes, rng: random.Random) -> bytes:
    """Some sectors written, the others not yet."""
    size = rng.choice((len(before), len(after)))
    parts = [
        (before, after)[rng.random() < 0.5][at : at + _SECTOR].ljust(_SECTOR, b"\0")
        for at in range(0, size, _SECTOR)
    ]
    return b"".join(parts)


def test_a_half_written_file_with_its_journal_is_the_old_one(path: Path, states: tuple[bytes, bytes]) -> None:
    before, after = states
    path.write_bytes(before)
    expected = contents(path)
    note = path.with_name("vault.db.sum").read_bytes()
    rng, whole = random.Random(3), journal(before)
    images = [after, before, *(mixed(before, after, rng) for _ in range(25))]
    for image in images:
        path.write_bytes(image)
        path.with_name("vault.db.sum").write_bytes(note)
        path.with_name("vault.db-journal").write_bytes(whole + rng.randbytes(rng.choice((0, 700))))
        assert contents(path) == expected
        assert not path.with_name("vault.db-journal").exists()


def test_a_half_written_journal_changes_nothing(path: Path, states: tuple[bytes, bytes]) -> None:
    """The file is not touched before its journal is whole; once it is done the journal has no head."""
    before, after = states
    whole, unsynced = journal(before), bytearray(journal(before))
    unsynced[:12] = bytes(12)  # neither a mark nor a count of records, until they are on the disk
    rng = random.Random(4)
    cuts = [0, 1, 28, 511, 512, 513, *(rng.randrange(len(whole)) for _ in range(15))]
    path.write_bytes(before)
    old = contents(path)
    path.write_bytes(after)
    new = contents(path)
    cases = [(before, bytes(unsynced[:cut]), old) for cut in cuts]
    cases += [(after, left, new) for left in (b"", bytes(28) + whole[28:], bytes(len(whole)))]
    for image, left, expected in cases:
        path.write_bytes(image)
        path.with_name("vault.db-journal").write_bytes(left)
        assert contents(path) == expected


def test_a_disk_that_lies_is_noticed(path: Path, states: tuple[bytes, bytes]) -> None:
    """Written in part, with no journal to go back by: damage, which is told and left as it is."""
    before, after = states
    rng = random.Random(5)
    for _ in range(40):
        image = mixed(before, after, rng)
        path.write_bytes(image)
        try:
            now = contents(path)
        except VaultDamaged:
            assert path.read_bytes() == image
        else:
            assert image in (before, after), now


# -- full and read-only disks ------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of a megabyte, where mounting one is allowed."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "perfit-test", str(disk)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a small disk needs root; the limits on file sizes above test the same")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def fill(disk: Path, *, leave: int) -> Path:
    """All but about `leave` bytes."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            file.truncate(file.tell() - leave)
    return filler


@pytest.mark.parametrize("leave", [0, 8192, 40_960, 77_824, 122_880])
def test_a_full_disk(path: Path, small_disk: Path, leave: int) -> None:
    before = contents(path)
    gone = _parts(path)
    moved = small_disk / "vault.db"
    shutil.copy(path, moved)
    filler = fill(small_disk, leave=leave)
    change(path)
    after = contents(path)
    try:
        change(moved)
    except VaultUnswept as error:
        assert "free some disk space" in str(error)
        assert contents(moved) == after
    except VaultError as error:
        assert "the disk is full, so nothing was changed" in str(error)
        assert contents(moved) == before
    filler.unlink()
    if contents(moved) == before:
        change(moved)
    assert contents(moved) == after
    data, kept = moved.read_bytes(), _parts(moved)
    assert not any(part in data for part in gone - kept)


def test_a_read_only_disk(path: Path, small_disk: Path) -> None:
    moved = small_disk / "vault.db"
    shutil.copy(path, moved)
    before = moved.read_bytes()
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(VaultError, match="cannot be written, so nothing was changed; make it"):
        change(moved)
    with pytest.raises(VaultError, match=r"cannot make|cannot write"):
        Vault.create(small_disk / "two" / "vault.db", PASSPHRASE, kdf=CHEAP)
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    assert moved.read_bytes() == before
    assert len(contents(moved)["example"]) == 30


def test_a_read_only_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As whoever may not write it sees it; root may."""
    before = {file.name: file.read_bytes() for file in path.parent.iterdir()}
    connect = sqlite3.connect

    def reading(name: str, **how: Any) -> sqlite3.Connection:
        return connect(name.replace("mode=rw", "mode=ro"), **how)

    monkeypatch.setattr(sqlite3, "connect", reading)
    with pytest.raises(VaultError, match="cannot be written, so nothing was changed; make it"):
        change(path)
    assert {file.name: file.read_bytes() for file in path.parent.iterdir()} == before
