"""Passphrases as people and systems hand them over, and what opening a vault may cost."""

from __future__ import annotations

import hashlib
import json
import os
import pty
import sqlite3
import subprocess
import sys
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from tests.support.device import Perfit

from perfit_device.vault import crypto as sealing
from perfit_device.vault.crypto import Header, KdfParams
from perfit_device.vault.store import Vault
from perfit_shared.errors import ConfigError, VaultError, WrongPassphrase

CHEAP = KdfParams(memory_kib=32, iterations=1, lanes=4)
NFC, NFD = "Trüffel-café", unicodedata.normalize("NFD", "Trüffel-café")


@pytest.mark.parametrize("made", ["words", "words\n", "words\r\n", NFC, NFD])
def test_line_ends_and_normal_forms_open_the_same_vault(tmp_path: Path, made: str) -> None:
    path = tmp_path / "v.db"
    Vault.create(path, made, kdf=CHEAP).close()
    plain = unicodedata.normalize("NFC", made.rstrip("\r\n"))
    for given in (plain, f"{plain}\n", f"{plain}\r\n", unicodedata.normalize("NFD", plain)):
        Vault.open(path, given).close()
    for wrong in (f" {plain}", f"{plain} ", f"\n{plain}", plain[:-1]):
        with pytest.raises(WrongPassphrase):
            Vault.open(path, wrong)


@pytest.mark.parametrize("raw", ["words\n", NFD])
def test_vaults_that_were_locked_by_the_raw_form_open(
    tmp_path: Path, raw: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as earlier:
        earlier.setattr(sealing, "passphrase_forms", lambda passphrase: [passphrase])
        Vault.create(tmp_path / "v.db", raw, kdf=CHEAP).close()
    Vault.open(tmp_path / "v.db", raw).close()
    if raw == NFD:
        Vault.open(tmp_path / "v.db", NFC).close()


def test_a_line_end_alone_is_no_passphrase(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="protects nothing"):
        Vault.create(tmp_path / "v.db", "\r\n", kdf=CHEAP)
    assert list(tmp_path.iterdir()) == []


def test_the_environment_s_passphrase(ready: Perfit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERFIT_PASSPHRASE", "correct horse\n")
    ready.ok("status")
    monkeypatch.setenv("PERFIT_PASSPHRASE", "\n")
    assert "a passphrase is needed" in ready.fails("status", code=1)
    monkeypatch.setenv("PERFIT_PASSPHRASE", "\udcff")
    assert "PERFIT_PASSPHRASE is not text in UTF-8" in ready.fails("status", code=1)


def test_the_passphrase_is_typed_at_the_terminal_while_stdin_is_data(
    home: Path, cloud: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`cat invite | perfit enroll -` failed, though the help shows it."""
    monkeypatch.delenv("PERFIT_PASSPHRASE")
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", _IN_A_SESSION, os.ttyname(theirs)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdin is not None
    process.stdin.write(cloud.invite().encode().encode())
    process.stdin.close()
    process.stdin = None
    asked = b""
    for wanted in (b"passphrase for this device: ", b"The same again: "):
        while wanted not in asked:
            asked += os.read(ours, 1000)  # ends with the process at the latest
        os.write(ours, b"typed\n")
    _, err = process.communicate(timeout=30)
    assert process.returncode == 0, err
    Vault.open(home / "profiles" / "default" / "vault.db", "typed").close()
    os.close(ours)
    os.close(theirs)


# Opening a terminal makes it the controlling one of a session that has none.
_IN_A_SESSION = """
import os, sys
os.close(os.open(sys.argv[1], os.O_RDWR))
sys.argv = ["perfit", "enroll", "-"]
from perfit_device.cli.main import run
run()
"""


# -- what opening costs --------------------------------------------------------------------------


def with_cost(path: Path, **cost: int) -> None:
    """Somebody who can write the file makes its header say this, digest and all."""
    connection = sqlite3.connect(path)
    (data,) = connection.execute("SELECT data FROM header").fetchone()
    body = json.dumps(json.loads(data[32:]) | cost, sort_keys=True).encode()
    connection.execute("UPDATE header SET data = ?", (hashlib.sha256(body).digest() + body,))
    connection.commit()
    connection.close()
    path.with_name("vault.db.sum").unlink()


@pytest.mark.parametrize(
    "cost",
    [
        {"memory_kib": 65537},
        {"iterations": 4},
        {"lanes": 5, "memory_kib": 64},
        {"memory_kib": 1 << 20, "iterations": 32},
    ],
)
def test_a_key_that_costs_more_than_ours_is_never_derived(
    tmp_path: Path, cost: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gigabyte and 32 passes took 58 s to refuse."""
    path = tmp_path / "vault.db"
    Vault.create(path, "words", kdf=CHEAP).close()
    with_cost(path, **cost)
    derived: list[KdfParams] = []
    monkeypatch.setattr(KdfParams, "derive", lambda self, *_: derived.append(self) or bytearray(32))
    for look in (lambda: Vault.open(path, "words"), lambda: Vault.lock_of(path)):
        with pytest.raises(VaultError, match="PERFIT_COSTLY_VAULT=1 opens it"):
            look()
    assert derived == []
    with pytest.raises(WrongPassphrase):
        Vault.open(path, "words", costly=True)
    assert len(derived) == 1


def test_what_we_write_ourselves_is_within_the_bounds() -> None:
    ours = KdfParams()
    assert (ours.memory_kib, ours.iterations, ours.lanes) == (64 * 1024, 3, 4)
    ours.check(ours)
    header = Header.create(bytes(32), "words", CHEAP)
    assert Header.from_bytes(header.to_bytes(), KdfParams()) == header


def test_costly_vaults_open_when_asked(
    home: Path, perfit: Perfit, cloud: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = home / "profiles" / "default" / "vault.db"
    Vault.create(path, "correct horse", kdf=KdfParams(64, 5, 4)).close()
    assert "PERFIT_COSTLY_VAULT" in perfit.fails("history", "list", code=6)
    monkeypatch.setenv("PERFIT_COSTLY_VAULT", "1")
    perfit.ok("history", "list")
