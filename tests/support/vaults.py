"""Vaults that are cheap to open, and what they hold."""

from __future__ import annotations

import random
import sqlite3
from contextlib import closing
from dataclasses import astuple
from pathlib import Path

import pytest

from perfit_device.vault.crypto import KdfParams
from perfit_device.vault.store import Vault

PASSPHRASE = "open sesame"
CHEAP = KdfParams(memory_kib=32, iterations=1, lanes=4)


def make_cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is sealed from here on, vaults and backups, costs what `CHEAP` does."""
    monkeypatch.setattr(KdfParams.__init__, "__defaults__", astuple(CHEAP))


def fill(path: Path) -> Path:
    """A vault with rows of many sizes, some of them rewritten and deleted."""
    rng = random.Random(1)
    with Vault.create(path, "open sesame", kdf=CHEAP) as vault:
        for n in range(40):
            vault.put("example", f"e{n}", rng.randbytes(rng.randrange(10, 600)))
        vault.put("shift", "cloud/task", rng.randbytes(40_000))
        vault.put("shift", "cloud/task", rng.randbytes(30_000))
        for n in range(0, 40, 5):
            vault.delete("example", f"e{n}")
    return path


def contents(path: Path, passphrase: str = PASSPHRASE) -> dict[str, dict[str, bytes]]:
    with Vault.open(path, passphrase, wait_seconds=0.2) as vault:
        return {kind: vault.list(kind) for kind in ("example", "shift", "other")}


def change(path: Path) -> None:
    """One that writes, replaces and removes."""
    with Vault.open(path, PASSPHRASE) as vault, vault.transaction():
        for n in range(0, 30, 2):
            vault.delete("example", f"e{n}")
        vault.put("shift", "cloud/task", b"n" * 30_000)
        vault.put("other", "new", b"x" * 9_000)


def sealed_rows(path: Path, kind: str) -> list[bytes]:
    """The sealed bytes of a closed vault's rows of this kind, as its file has them."""
    with closing(sqlite3.connect(path)) as connection:
        return [row[0] for row in connection.execute("SELECT sealed FROM rows WHERE kind = ?", (kind,))]
