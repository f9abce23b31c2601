"""Format 1 stays readable, byte for byte as some device has it; a later format is refused and left alone."""

from __future__ import annotations

import hashlib
import json
import shutil
import sqlite3
from pathlib import Path

import pytest
from tests.support import old_files
from tests.support.old_files import ARTEFACT, CLOUD, KEPT, PASSPHRASE, PLACE, PLAN, SEED, STEPS

from perfit_device import history, personal
from perfit_device.cli.common import read_enrolment, recall
from perfit_device.cloud.identity import identity_in
from perfit_device.training import update as updates
from perfit_device.vault.store import Vault
from perfit_shared.errors import VaultError, WrongPassphrase


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    path = tmp_path / "vault.db"
    shutil.copy(KEPT, path)
    return path


def check(vault: Vault) -> None:
    enrolment = read_enrolment(vault)
    assert enrolment is not None
    assert (enrolment.address, enrolment.enrolment_address, enrolment.cloud_id) == ("a:1", "a:2", CLOUD)
    assert enrolment.identity.matches(enrolment.certificate)
    assert identity_in(enrolment.certificate) == ""
    known = recall(vault)
    assert (known.cloud_id, list(known.tasks)) == (CLOUD, ["news_headline"])
    expected = old_files.items()
    assert [item.name for item in history.load(vault)] == [item.name for item in expected]
    assert history.split(history.load(vault)).digest() == PLAN.history
    shift = personal.load(vault, CLOUD, ARTEFACT)
    assert shift is not None
    assert (shift.tensors.digest(), shift.updates) == (SEED.digest(), 2)
    half_done = updates.read_checkpoint(vault, PLACE)
    assert half_done is not None
    assert (half_done.schedule, half_done.step) == (PLAN, STEPS)


def test_a_vault_of_format_1_opens(kept: Path) -> None:
    with Vault.open(kept, PASSPHRASE) as vault:
        check(vault)
        vault.put("example", "new", b"{}")
        vault.delete("example", "new")
    with Vault.open(kept, PASSPHRASE) as vault:
        check(vault)
        vault.change_passphrase("the next")
    with pytest.raises(WrongPassphrase):
        Vault.open(kept, PASSPHRASE)
    with Vault.open(kept, "the next") as vault:
        check(vault)


def test_the_kept_vault_is_what_is_written_today(tmp_path: Path) -> None:
    """Or else the format changed, and wants a number of its own, and a way from the old to the new."""
    old_files.write(tmp_path / "vault.db")
    with Vault.open(tmp_path / "vault.db", PASSPHRASE) as vault:
        check(vault)

    def shape(path: Path) -> tuple[object, ...]:
        connection = sqlite3.connect(path)
        schema = connection.execute("SELECT name, sql FROM sqlite_schema ORDER BY name").fetchall()
        kinds = connection.execute("SELECT kind, count(*) FROM rows GROUP BY kind").fetchall()
        (header,) = connection.execute("SELECT data FROM header").fetchone()
        pragmas = [connection.execute(f"PRAGMA {p}").fetchone() for p in ("application_id", "user_version")]
        connection.close()
        return schema, kinds, pragmas, sorted(json.loads(header[32:]))

    copy = tmp_path / "kept.db"
    shutil.copy(KEPT, copy)
    assert shape(tmp_path / "vault.db") == shape(copy)


@pytest.mark.parametrize(
    "more", ["", "CREATE TABLE notes (id BLOB)", "ALTER TABLE rows ADD COLUMN more BLOB"]
)
def test_a_later_format_is_refused_and_left_alone(kept: Path, more: str) -> None:
    connection = sqlite3.connect(kept)
    (data,) = connection.execute("SELECT data FROM header").fetchone()
    later = json.dumps(json.loads(data[32:]) | {"format": 2, "what": "is new"}).encode()
    connection.execute("UPDATE header SET data = ?", (hashlib.sha256(later).digest() + later,))
    connection.executescript(more)
    connection.commit()
    connection.close()
    before = kept.read_bytes()
    for look in (lambda: Vault.open(kept, PASSPHRASE), lambda: Vault.lock_of(kept)):
        with pytest.raises(
            VaultError, match=r"format 2, .* use the version of perfit that wrote it"
        ) as raised:
            look()
        assert type(raised.value) is VaultError
    assert [file.name for file in kept.parent.iterdir()] == ["vault.db"]
    assert kept.read_bytes() == before
