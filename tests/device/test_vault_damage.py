"""Every change to a vault's file is noticed: one error before anything of it runs, and no byte is touched."""

from __future__ import annotations

import hashlib
import json
import random
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from tests.support.vaults import CHEAP, PASSPHRASE, contents, fill

from perfit_device.vault import checksum
from perfit_device.vault import crypto as sealing
from perfit_device.vault.crypto import Header, KdfParams
from perfit_device.vault.store import Vault
from perfit_shared.errors import VaultBusy, VaultDamaged, VaultError, WrongPassphrase


@pytest.fixture
def filled(tmp_path: Path) -> Path:
    return fill(tmp_path / "vault.db")


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


def test_every_part_of_the_file_is_in_the_note(filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Free pages are guarded by nothing else."""
    monkeypatch.setattr(checksum, "_PART", 4096)
    with Vault.open(filled, PASSPHRASE) as vault:
        vault.put("example", "large", bytes(50_000))
        with monkeypatch.context() as patched:
            patched.setattr(Vault, "_sweep", lambda self: vault._execute("PRAGMA user_version=0"))
            vault.delete("example", "large")
    good = filled.read_bytes()
    for at in range(4096, len(good), 4096):
        image = bytearray(good)
        image[at + 2000] ^= 1
        filled.write_bytes(image)
        with pytest.raises(VaultDamaged):
            Vault.open(filled, PASSPHRASE)


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


def test_the_list_of_rows_is_compared_in_constant_time(
    filled: Path, compared: list[tuple[bytes, bytes]]
) -> None:
    with sqlite3.connect(filled) as file:
        file.execute("UPDATE header SET list_mac = ?", (bytes(32),))
    file.close()
    with pytest.raises(VaultDamaged):
        contents(filled)
    assert any(mac == bytes(32) and len(other) == 32 for mac, other in compared)


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


def reworded(header: Header, **changes: Any) -> bytes:
    """The header with other values and the digest that fits them."""
    body = json.dumps(json.loads(header.to_bytes()[32:]) | changes, sort_keys=True).encode()
    return hashlib.sha256(body).digest() + body


@pytest.mark.parametrize(
    "changes",
    [
        {"memory_kib": 64 << 20},
        {"memory_kib": 1},
        {"memory_kib": 0},
        {"memory_kib": -1},
        {"memory_kib": 1e9},
        {"memory_kib": "64"},
        {"iterations": 1000},
        {"iterations": 0},
        {"lanes": 0},
        {"lanes": 255},
        {"salt": ""},
        {"salt": "AAAA"},
        {"wrapped": ""},
        {"wrapped": "AAAA"},
        {"lock": "none"},
        {"lock": 5},
        {"vault_id": "../../etc"},
        {"vault_id": 7},
        {"format": "x"},
        {"format": None},
        {"salt": None},
        {"format": [[[]]]},
        {"format": 1e400},
    ],
)
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
