"""The vault keeps what it was given, shows nobody else, and never half-writes."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from tests.support.vaults import CHEAP, PASSPHRASE, contents, fill

from perfit_device.vault.store import Vault
from perfit_shared.errors import (
    ConfigError,
    NotFound,
    PerfitError,
    VaultBusy,
    VaultDamaged,
    VaultError,
    WrongPassphrase,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "profiles" / "p" / "vault.db"


@pytest.fixture
def filled(path: Path) -> Path:
    return fill(path)


def test_round_trip(path: Path) -> None:
    with Vault.create(path, "open sesame", kdf=CHEAP) as vault:
        assert vault.get("a", "x") is None
        vault.put("a", "x", b"one")
        vault.put("a", "x", b"two")
        vault.put("b", "x", b"")
        assert vault.delete("a", "nothing") is False
    with Vault.open(path, "open sesame") as vault:
        assert vault.list("a") == {"x": b"two"}
        assert vault.get("b", "x") == b"" and vault.has("b", "x") and not vault.has("b", "y")
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert sorted(p.name for p in path.parent.iterdir()) == ["vault.db", "vault.db.sum"]
    with pytest.raises(VaultError, match="already"):
        Vault.create(path, "other", kdf=CHEAP)
    with pytest.raises(NotFound):
        Vault.open(path.with_name("no.db"), "x")


def test_nothing_readable_lies_in_the_file(path: Path) -> None:
    with Vault.create(path, "open sesame", kdf=CHEAP) as vault:
        vault.put("example", "a telling name", b"canary-secret " * 50)
    data = path.read_bytes()
    assert b"canary" not in data and b"telling" not in data and b"sesame" not in data


def test_wrong_passphrase_touches_nothing(filled: Path) -> None:
    before = filled.read_bytes()
    with pytest.raises(WrongPassphrase):
        Vault.open(filled, "open simsim")
    assert filled.read_bytes() == before
    assert len(contents(filled)["example"]) == 32


def test_ctrl_c_just_after_a_change_parts_nothing(filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The vault went on with the list of before, and the next change made the file a damaged one."""
    execute = Vault._execute

    def interrupted(self: Vault, sql: str, *values: Any) -> Any:
        found = execute(self, sql, *values)
        if sql == "COMMIT":
            raise KeyboardInterrupt
        return found

    with Vault.open(filled, PASSPHRASE) as vault:
        with monkeypatch.context() as patched:
            patched.setattr(Vault, "_execute", interrupted)
            with pytest.raises(KeyboardInterrupt):
                vault.put("example", "new", b"one")
        assert vault.get("example", "new") == b"one"
        vault.put("example", "newer", b"two")
    now = contents(filled)["example"]
    assert (now["new"], now["newer"]) == (b"one", b"two")


def test_closing_overwrites_the_key(filled: Path) -> None:
    with Vault.open(filled, PASSPHRASE) as vault:
        key = vault._key._key
        assert any(key)
    assert key == bytes(32)
    with pytest.raises(VaultDamaged):
        filled.write_bytes(filled.read_bytes()[:-4096])
        Vault.open(filled, PASSPHRASE)


def test_a_second_process_waits_and_is_told(filled: Path) -> None:
    script = (
        "import sys, pathlib, time\nfrom perfit_device.vault.store import Vault\n"
        "with Vault.open(pathlib.Path(sys.argv[1]), 'open sesame') as v:\n"
        "    print('open', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(filled)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None and other.stdout.readline() == b"open\n"
        with pytest.raises(VaultBusy, match="another perfit"):  # who holds it holds it until told
            Vault.open(filled, "open sesame", wait_seconds=0.3)
        assert other.stdin is not None
        other.stdin.close()
        other.wait(20)
    assert len(contents(filled)["example"]) == 32


def test_a_transaction_is_all_or_nothing(filled: Path) -> None:
    before = contents(filled)
    with Vault.open(filled, "open sesame") as vault:
        with pytest.raises(ZeroDivisionError), vault.transaction():
            vault.put("example", "new", b"x")
            vault.delete("example", "e1")
            raise ZeroDivisionError
        assert vault.get("example", "new") is None and vault.get("example", "e1") is not None
        with vault.transaction():
            vault.put("example", "new", b"x")
            vault.delete("example", "e1")
    after = contents(filled)
    assert "e1" not in after["example"] and after["example"]["new"] == b"x"
    assert len(after["example"]) == len(before["example"])


def test_a_change_of_passphrase_rewraps_one_key(filled: Path) -> None:
    before = contents(filled)

    def rows() -> list[tuple[object, ...]]:
        with sqlite3.connect(filled) as connection:
            found = connection.execute("SELECT * FROM rows").fetchall()
        connection.close()
        return found

    old_rows = rows()
    with Vault.open(filled, "open sesame") as vault:
        vault.change_passphrase("new")
    assert rows() == old_rows
    with pytest.raises(WrongPassphrase):
        Vault.open(filled, "open sesame")
    assert contents(filled, "new") == before


_WRITER = """
import itertools, pathlib, sys
from perfit_device.vault.store import Vault
with Vault.open(pathlib.Path(sys.argv[1]), "open sesame") as vault:
    for n in itertools.count(1):
        with vault.transaction():
            vault.put("shift", "a", n.to_bytes(4, "big") * 5000)
            vault.put("shift", "b", n.to_bytes(4, "big") * 3000)
        print(n, flush=True)
"""


def test_a_kill_at_any_moment_leaves_the_old_or_the_new_version(filled: Path) -> None:
    rng = random.Random(3)
    for _ in range(6):
        with subprocess.Popen(
            [sys.executable, "-c", _WRITER, str(filled)], stdout=subprocess.PIPE, text=True
        ) as writer:
            assert writer.stdout is not None and writer.stdout.readline()
            time.sleep(rng.uniform(0.01, 0.2))
            os.kill(writer.pid, signal.SIGKILL)
            reported = [int(line) for line in writer.stdout.read().split() if line.isdigit()]
        shifts = contents(filled)["shift"]
        version = int.from_bytes(shifts["a"][:4], "big")
        assert shifts["a"] == version.to_bytes(4, "big") * 5000
        assert shifts["b"] == version.to_bytes(4, "big") * 3000
        assert not reported or version >= reported[-1]


def test_a_full_disk_loses_nothing(filled: Path) -> None:
    before = contents(filled)
    with Vault.open(filled, "open sesame") as vault:
        pages = vault._connection.execute("PRAGMA page_count").fetchone()[0]
        vault._connection.execute(f"PRAGMA max_page_count = {pages}")
        with pytest.raises(VaultError, match="disk is full"):
            vault.put("shift", "cloud/task", bytes(500_000))
        assert vault.list("shift") == before["shift"]
        vault.delete("example", "e1")
    assert contents(filled)["shift"] == before["shift"]


def test_the_keyring_holds_the_key_when_asked(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import keyring
    from keyring.backend import KeyringBackend

    class Memory(KeyringBackend):
        priority = 1.0
        held: dict[tuple[str, str], str] = {}  # noqa: RUF012

        def set_password(self, service: str, username: str, password: str) -> None:
            self.held[service, username] = password

        def get_password(self, service: str, username: str) -> str | None:
            return self.held.get((service, username))

    old = keyring.get_keyring()
    try:
        keyring.set_keyring(Memory())
        with Vault.create(path, None, kdf=CHEAP) as vault:
            vault.put("a", "x", b"one")
        assert Vault.lock_of(path) == "keyring"
        with Vault.open(path, None) as vault:
            assert vault.get("a", "x") == b"one"
        Memory.held.clear()
        with pytest.raises(VaultError, match="keyring holds no key"):
            Vault.open(path, None)
        from keyring.backends.fail import Keyring

        keyring.set_keyring(Keyring())
        with pytest.raises(ConfigError, match="passphrase instead"):
            Vault.create(path.with_name("two.db"), None, kdf=CHEAP)
    finally:
        keyring.set_keyring(old)
    assert not path.with_name("two.db").exists()


def test_errors_are_ours(filled: Path) -> None:
    filled.chmod(0o600)
    with pytest.raises(PerfitError):
        Vault.open(filled.parent, "open sesame")


class LateFile:
    """A file that is closed a moment after the rest of its vault, or once another thread has opened it."""

    def __init__(self, file: Any, opened: threading.Event) -> None:
        self._file, self._opened = file, opened

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def close(self) -> None:
        self._opened.wait(0.5)
        self._file.close()


def test_a_thread_that_closes_the_file_drops_no_other_threads_lock(tmp_path: Path) -> None:
    """POSIX drops a process's locks on a file with any handle of it that closes: rows got lost."""
    path = tmp_path / "vault.db"
    Vault.create(path, PASSPHRASE, kdf=CHEAP).close()
    first, opened, second = Vault.open(path, PASSPHRASE), threading.Event(), list[Vault]()
    first._file = LateFile(first._file, opened)  # type: ignore[assignment]

    def open_second() -> None:
        second.append(Vault.open(path, PASSPHRASE, wait_seconds=30))
        opened.set()

    waiting = threading.Thread(target=open_second)
    waiting.start()
    first.close()
    waiting.join(60)
    program = (
        "import sys; from pathlib import Path; from perfit_device.vault.store import Vault\n"
        "Vault.open(Path(sys.argv[1]), sys.argv[2], wait_seconds=0.1)"
    )
    words = [sys.executable, "-c", program, str(path), PASSPHRASE]
    found = subprocess.run(words, capture_output=True, text=True, check=False)
    second[0].close()
    assert "VaultBusy" in found.stderr
