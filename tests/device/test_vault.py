"""The vault keeps what it was given, shows nobody else, notices every change, and never half-writes."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from perfit_device import sealing
from perfit_device.sealing import Header, KdfParams
from perfit_device.vault import Vault
from perfit_shared.errors import (
    ConfigError,
    NotFound,
    PerfitError,
    VaultBusy,
    VaultDamaged,
    VaultError,
    WrongPassphrase,
)

PASSPHRASE = "open sesame"
CHEAP = KdfParams(memory_kib=32, iterations=1, lanes=4)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "profiles" / "p" / "vault.db"


@pytest.fixture
def filled(path: Path) -> Path:
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


def test_every_flipped_bit_is_noticed_and_nothing_is_touched(filled: Path) -> None:
    good, rng, missed = filled.read_bytes(), random.Random(2), []
    places = [*range(0, 100), *(rng.randrange(len(good)) for _ in range(300))]
    for place in places:
        damaged = bytearray(good)
        damaged[place] ^= 1 << rng.randrange(8)
        filled.write_bytes(damaged)
        try:
            contents(filled)
            missed.append(place)
        except (VaultDamaged, VaultError) as error:
            assert not isinstance(error, WrongPassphrase | VaultBusy), place
        assert filled.read_bytes() == bytes(damaged), place
    assert missed == []
    filled.write_bytes(good + b"x" * 4096)
    with pytest.raises(VaultDamaged):
        contents(filled)
    filled.write_bytes(good)
    assert len(contents(filled)["example"]) == 32


def test_without_its_note_the_rows_still_guard_themselves(filled: Path) -> None:
    """Then a flip in free space passes, and any other is noticed: nothing wrong is ever returned."""
    good, expected, rng = filled.read_bytes(), contents(filled), random.Random(4)
    for _ in range(150):
        filled.with_name("vault.db.sum").unlink(missing_ok=True)
        damaged = bytearray(good)
        damaged[rng.randrange(len(good))] ^= 1 << rng.randrange(8)
        filled.write_bytes(damaged)
        try:
            assert contents(filled) == expected
        except VaultError as error:
            assert not isinstance(error, WrongPassphrase)


def test_a_damaged_note_bricks_nothing(filled: Path) -> None:
    note = filled.with_name("vault.db.sum")
    for data in (b"", b"x" * 44, note.read_bytes()[:-1] + b"?"):
        note.write_bytes(data)
        assert len(contents(filled)["example"]) == 32


def test_a_vanished_revived_or_swapped_row_is_noticed(filled: Path) -> None:
    def tamper(sql: str) -> None:
        with sqlite3.connect(filled) as connection:
            connection.execute(sql)
        connection.close()

    good = filled.read_bytes()
    for sql in (
        "DELETE FROM rows WHERE id = (SELECT min(id) FROM rows WHERE kind = 'example')",
        "UPDATE rows SET version = version + 1",
        "UPDATE rows SET kind = 'shift2' WHERE kind = 'shift'",
        "INSERT INTO rows SELECT 'copy', id, version, wrapped_key, sealed FROM rows WHERE kind = 'shift'",
        "UPDATE header SET list_mac = zeroblob(32)",
        "DELETE FROM header",
        "DROP TABLE rows",
        "PRAGMA application_id = 7",
    ):
        filled.write_bytes(good)
        tamper(sql)
        with pytest.raises(VaultDamaged):
            contents(filled)


def test_cut_empty_and_foreign_files_are_damage(filled: Path) -> None:
    good = filled.read_bytes()
    for data in (b"", good[:100], good[: len(good) // 2], b"#!/bin/sh\n" * 400, good[:-4096]):
        filled.write_bytes(data)
        with pytest.raises(VaultDamaged):
            contents(filled)
        assert filled.read_bytes() == data


def test_a_file_that_was_prepared_is_refused(filled: Path) -> None:
    """A trigger would have kept every row that the user forgot; and rows can hide in a view."""
    good = filled.read_bytes()
    for sql in (
        "CREATE TABLE kept AS SELECT * FROM rows LIMIT 0;"
        "CREATE TRIGGER keep BEFORE DELETE ON rows BEGIN INSERT INTO kept SELECT * FROM rows; END",
        "CREATE TRIGGER rows BEFORE DELETE ON rows BEGIN SELECT RAISE(IGNORE); END",
        "CREATE TRIGGER header BEFORE UPDATE ON header BEGIN SELECT RAISE(IGNORE); END",
        "CREATE INDEX copy ON rows (sealed)",
        "CREATE VIEW more AS SELECT * FROM rows",
        "ALTER TABLE rows RENAME TO kept; CREATE VIEW rows AS SELECT * FROM kept",
        "ALTER TABLE header ADD COLUMN more TEXT",
    ):
        filled.write_bytes(good)
        connection = sqlite3.connect(filled)
        connection.executescript(sql)
        connection.close()
        prepared = filled.read_bytes()
        with pytest.raises(VaultDamaged, match="not a whole vault"):
            contents(filled)
        assert filled.read_bytes() == prepared


def test_a_row_cannot_stand_for_two(filled: Path) -> None:
    """Its kind went into the list as it was: with line breaks in it, another row vanished unseen."""
    connection = sqlite3.connect(filled)
    rows = connection.execute("SELECT * FROM rows WHERE kind = 'example' ORDER BY id DESC LIMIT 2").fetchall()
    second, (kind, row_id, version, wrapped, sealed) = rows
    digest = hashlib.sha256(wrapped + sealed).hexdigest()
    line = f"{kind}\0{row_id.hex()}\0{version}\0{digest}\n"
    connection.execute("DELETE FROM rows WHERE id IN (?, ?)", (row_id, second[1]))
    connection.execute("INSERT INTO rows VALUES (?, ?, ?, ?, ?)", (line + second[0], *second[1:]))
    connection.commit()
    connection.close()
    with pytest.raises(VaultDamaged, match="lost a part"):
        contents(filled)


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


def reworded(header: Header, **changes: Any) -> bytes:
    """The header with other values and the digest that fits them."""
    body = json.dumps(json.loads(header.to_bytes()[32:]) | changes, sort_keys=True).encode()
    return hashlib.sha256(body).digest() + body


@pytest.mark.parametrize(
    "changes",
    [
        {"memory_kib": 64 << 20}, {"memory_kib": 1}, {"memory_kib": 0}, {"memory_kib": -1},
        {"memory_kib": 1e9}, {"memory_kib": "64"}, {"iterations": 1000}, {"iterations": 0},
        {"lanes": 0}, {"lanes": 255},
        {"salt": ""}, {"salt": "AAAA"}, {"wrapped": ""}, {"wrapped": "AAAA"}, {"lock": "none"}, {"lock": 5},
        {"vault_id": "../../etc"}, {"vault_id": 7}, {"format": "x"}, {"format": None}, {"salt": None},
        {"format": [[[]]]}, {"format": 1e400},
    ],
)  # fmt: skip
def test_what_a_header_asks_for_is_bounded_before_it_is_done(
    filled: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    """A salt of 3 bytes, or a wrapped key of none, was a ValueError of the library's."""
    monkeypatch.setattr(sealing, "Argon2id", lambda **_: pytest.fail("derived"))
    connection = sqlite3.connect(filled)
    (data,) = connection.execute("SELECT data FROM header").fetchone()
    asked = reworded(Header.from_bytes(data), **changes)
    connection.execute("UPDATE header SET data = ?", (asked,))
    connection.commit()
    connection.close()
    before = filled.read_bytes()
    with pytest.raises(VaultDamaged):
        Vault.open(filled, PASSPHRASE)
    assert filled.read_bytes() == before


@pytest.mark.parametrize("where", [(24, 28), (28, 32), (24, 32), (92, 96)])
@pytest.mark.parametrize("cut", [0, 100])
def test_counts_of_pages_that_disagree_are_left_alone(filled: Path, where: tuple[int, int], cut: int) -> None:
    """SQLite wrote the file's number of pages anew, and then the vault was found to be damaged."""
    before = bytearray(filled.read_bytes())
    before[where[0] : where[1]] = bytes(where[1] - where[0])
    filled.write_bytes(before[: len(before) - cut])
    with pytest.raises(VaultDamaged):
        Vault.open(filled, PASSPHRASE)
    assert filled.read_bytes() == before[: len(before) - cut]


def test_a_header_of_brackets_is_damage() -> None:
    body = b"[" * 100_000
    with pytest.raises(VaultDamaged):
        Header.from_bytes(hashlib.sha256(body).digest() + body)


def test_an_absurd_cost_is_refused() -> None:
    for params in ((1 << 30, 3, 4), (64 * 1024, 10**6, 4), (64 * 1024, 3, 1000), (True, 1, 1)):
        with pytest.raises(VaultDamaged):
            KdfParams(*params)


def test_parameters_cannot_be_swapped_by_who_lacks_the_passphrase() -> None:
    """The header's digest can be recomputed by anyone; the wrapped key is bound to the rest."""
    from dataclasses import replace

    header = Header.create(b"k" * 32, "x", CHEAP)
    assert header.unwrap("x") == b"k" * 32
    for changed in (replace(header, vault_id="0" * 32), replace(header, salt=bytes(16))):
        with pytest.raises(WrongPassphrase):
            Header.from_bytes(changed.to_bytes()).unwrap("x")


def test_a_second_process_waits_and_is_told(filled: Path) -> None:
    script = (
        "import sys, pathlib, time\nfrom perfit_device.vault import Vault\n"
        "with Vault.open(pathlib.Path(sys.argv[1]), 'open sesame') as v:\n"
        "    print('open', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(filled)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None and other.stdout.readline() == b"open\n"
        start = time.monotonic()
        with pytest.raises(VaultBusy, match="another perfit"):
            Vault.open(filled, "open sesame", wait_seconds=0.3)
        assert time.monotonic() - start < 5
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
        kept_shift = vault._connection.execute("SELECT sealed FROM rows WHERE kind = 'shift'").fetchone()[0]
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
from perfit_device.vault import Vault
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


_WRITER = """
import itertools, pathlib, sys
from perfit_device.vault import Vault
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
