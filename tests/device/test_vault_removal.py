"""What was removed from a vault stands in no file of its folder, after a kill and one opening either."""

from __future__ import annotations

import base64
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from tests.support.vaults import CHEAP, PASSPHRASE, contents, fill, sealed_rows

from perfit_device.vault.crypto import Header
from perfit_device.vault.store import Vault
from perfit_shared.errors import VaultDamaged


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "vault.db"


@pytest.fixture
def filled(path: Path) -> Path:
    return fill(path)


def test_deleted_rows_leave_no_bytes_behind(filled: Path) -> None:
    """Every sealed row that ever existed is looked for in the file, in runs of 16 bytes."""

    def runs() -> set[bytes]:
        with sqlite3.connect(filled) as connection:
            rows = connection.execute(
                "SELECT wrapped_key, sealed FROM rows WHERE kind = 'example'"
            ).fetchall()
        connection.close()
        return {part[i : i + 16] for row in rows for part in row for i in range(0, len(part) - 15, 16)}

    gone = runs()
    assert all(run in filled.read_bytes() for run in gone), "the scan finds nothing, so it proves nothing"
    with Vault.open(filled, "open sesame") as vault:
        for name in list(vault.list("example"))[:20]:
            vault.delete("example", name)
    kept_shift = sealed_rows(filled, "shift")[0]
    with Vault.open(filled, "open sesame") as vault:
        vault.put("shift", "cloud/task", b"smaller")
    gone |= {kept_shift[i : i + 16] for i in range(0, len(kept_shift) - 15, 16)}
    kept = runs()
    data = filled.read_bytes()
    assert [run for run in gone - kept if run in data] == []
    assert len(contents(filled)["example"]) == 12


def test_a_kill_before_the_sweep_is_made_good_on_opening(
    filled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with sqlite3.connect(filled) as connection:
        sealed = [row[0] for row in connection.execute("SELECT sealed FROM rows WHERE kind = 'example'")]
    connection.close()
    with monkeypatch.context() as patched:
        patched.setattr(Vault, "_sweep", lambda self: None)  # as if killed just there
        with Vault.open(filled, "open sesame") as vault, vault.transaction():
            for name in list(vault.list("example")):
                vault.delete("example", name)
    contents(filled)
    data = filled.read_bytes()
    assert not any(row[i : i + 16] in data for row in sealed for i in range(0, len(row) - 15, 16))


def test_a_sweep_that_was_put_off_comes_at_the_latest_in_closing(
    filled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each checkpoint of an update had the whole vault rewritten, with all versions that lie in it."""

    def swept() -> bool:
        with sqlite3.connect(f"file:{filled}?immutable=1", uri=True) as connection:
            found = connection.execute("PRAGMA user_version").fetchone()[0] == 0
        connection.close()
        return bool(found)

    sweeps: list[bool] = []
    real = Vault._sweep
    monkeypatch.setattr(Vault, "_sweep", lambda self: (sweeps.append(True), real(self)))
    before = sealed_rows(filled, "shift")[0]
    vault = Vault.open(filled, PASSPHRASE)
    sweeps.clear()
    for _ in range(3):
        vault.put("shift", "cloud/task", bytes(5000), sweep=False)
    assert not sweeps and not swept()
    vault.delete("example", "e1")  # what is forgotten is swept at once, and all else with it
    assert len(sweeps) == 1 and swept()
    vault.put("shift", "cloud/task", bytes(5000), sweep=False)
    vault.close()
    assert len(sweeps) == 2 and swept()
    data = filled.read_bytes()
    assert not any(before[i : i + 16] in data for i in range(0, len(before) - 15, 16))
    assert contents(filled)["shift"] == {"cloud/task": bytes(5000)}


def test_a_kill_in_a_reserve_leaves_no_row(filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between its two changes; the row, as large as a checkpoint, stayed until the next update."""
    size = filled.stat().st_size

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, Vault.open(filled, PASSPHRASE) as vault:
        patched.setattr(vault, "delete", killed)
        with pytest.raises(KeyboardInterrupt):
            vault.reserve(300_000)
    assert filled.stat().st_size > size + 300_000
    with Vault.open(filled, PASSPHRASE) as vault:
        assert vault.list("reserve") == {}
    assert filled.stat().st_size <= size + 8192


def test_a_kill_in_the_sweep_leaves_a_file_too_long(filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SQLite cuts the file after VACUUM is done, and a vault killed just before was refused as damaged."""
    before = contents(filled)
    with monkeypatch.context() as patched:
        patched.setattr(Vault, "_sweep", lambda self: None)
        with Vault.open(filled, PASSPHRASE) as vault:
            vault.delete("example", "e1")
    rest = b"what was cut off too late".ljust(3 * 4096, b".")
    filled.write_bytes(filled.read_bytes() + rest)
    del before["example"]["e1"]
    assert contents(filled) == before
    assert b"too late" not in filled.read_bytes()
    with filled.open("ab") as file:
        file.write(rest)
    with pytest.raises(VaultDamaged):  # swept: then it is somebody's
        contents(filled)


_FORGETTER = """
import os, pathlib, signal, sys
from perfit_device.vault.store import Vault
with Vault.open(pathlib.Path(sys.argv[1]), "open sesame") as vault:
    vault.change_passphrase("new")
    with vault.transaction():
        for name in vault.list("example"):
            vault.delete("example", name)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_kill_after_forgetting_leaves_nothing_beside_the_file(path: Path) -> None:
    """The journal of the last change stayed, with pages of before, until somebody wrote again."""
    with Vault.create(path, PASSPHRASE, kdf=CHEAP) as vault, vault.transaction():
        for n in range(40):
            vault.put("example", f"e{n}", bytes(700))
    with sqlite3.connect(path) as connection:
        rows = [row[0] for row in connection.execute("SELECT sealed FROM rows WHERE kind = 'example'")]
        header = connection.execute("SELECT data FROM header").fetchone()[0]
    connection.close()
    gone = [row[i : i + 16] for row in rows for i in range(0, len(row) - 15, 16)]
    gone.append(base64.b64encode(Header.from_bytes(header).wrapped))
    assert all(piece in path.read_bytes() for piece in gone)
    subprocess.run([sys.executable, "-c", _FORGETTER, str(path)], check=False)
    for file in path.parent.iterdir():
        data = file.read_bytes()
        assert not any(piece in data for piece in gone), file.name
    assert contents(path, "new")["example"] == {}
