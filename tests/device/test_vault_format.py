"""Vaults of every format open, byte for byte as some device has them; a later format is refused."""

from __future__ import annotations

import hashlib
import json
import shutil
import sqlite3
from pathlib import Path

import pytest
from tests.support import old_files
from tests.support.old_files import (
    ARTEFACT,
    CLOUD,
    FIRST_OF_1,
    KEPT,
    KEPT_OF_1,
    LEARNED,
    NEXT,
    OTHER,
    PASSPHRASE,
    PLAN,
    ROW,
    SEED,
    STEPS,
    TWO,
    header_of,
    versions,
)

from perfit_device import history, personal
from perfit_device.cloud.identity import identity_in
from perfit_device.cloud_record import read_enrolment, read_record
from perfit_device.shift_versions import TrainingSummary
from perfit_device.training import update as updates
from perfit_device.vault.crypto import Header
from perfit_device.vault.store import Vault
from perfit_shared.errors import VaultDamaged, VaultError, WrongPassphrase


@pytest.fixture
def kept(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A copy of the file named, of today's format without a name."""
    path = tmp_path / "vault.db"
    shutil.copy(getattr(request, "param", KEPT), path)
    return path


def check(vault: Vault) -> None:
    """All but the shifts."""
    enrolment = read_enrolment(vault)
    assert enrolment is not None
    assert (enrolment.address, enrolment.enrolment_address, enrolment.cloud_id) == ("a:1", "a:2", CLOUD)
    assert enrolment.identity.matches(enrolment.certificate)
    assert identity_in(enrolment.certificate) == ""
    known = read_record(vault)
    assert (known.cloud_id, list(known.tasks)) == (CLOUD, ["news_headline"])
    expected = old_files.items()
    assert [item.name for item in history.load(vault)] == [item.name for item in expected]
    assert history.split(history.load(vault)).digest() == PLAN.history
    half_done = updates.read_checkpoint(vault, ROW)
    assert half_done is not None
    assert (half_done.schedule, half_done.step) == (PLAN, STEPS)


@pytest.mark.parametrize("kept", [KEPT_OF_1, KEPT], indirect=True)
def test_a_kept_vault_opens(kept: Path) -> None:
    with Vault.open(kept, PASSPHRASE) as vault:
        check(vault)
        assert versions(vault) == TWO
        mine, other = personal.load(vault, CLOUD, ARTEFACT), personal.load(vault, CLOUD, OTHER)
        assert mine is not None and other is not None
        assert (mine.tensors.digest(), mine.updates, mine.forgotten) == (NEXT.digest(), 3, 0)
        assert (other.tensors.digest(), other.updates, other.forgotten) == (SEED.digest(), 1, 2)
        last = updates.read_finished(vault, ROW)
        assert last is not None and last.plan == PLAN
        vault.put("example", "new", b"{}")
        vault.delete("example", "new")
    with Vault.open(kept, PASSPHRASE) as vault:
        check(vault)
        vault.change_passphrase("the next")
    with pytest.raises(WrongPassphrase):
        Vault.open(kept, PASSPHRASE)
    with Vault.open(kept, "the next") as vault:
        check(vault)
        assert personal.undo(vault, CLOUD, ARTEFACT.name).number == 1
        mine = personal.load(vault, CLOUD, ARTEFACT)
        assert mine is not None and mine.tensors.digest() == SEED.digest()


@pytest.mark.parametrize("kept", [FIRST_OF_1], indirect=True)
def test_a_vault_from_before_undo_opens(kept: Path) -> None:
    with Vault.open(kept, PASSPHRASE) as vault:
        check(vault)
        assert versions(vault) == TWO[:1]


def test_what_is_known_of_a_version_is_kept(kept: Path) -> None:
    with Vault.open(kept, PASSPHRASE) as vault:
        mine = personal.read_versions(vault, CLOUD, ARTEFACT.name)
    assert mine is not None
    assert [version.learned for version in mine.kept] == [TrainingSummary(), LEARNED]
    assert mine.now.date[:2] == "20" and mine.now.date[-1] == "Z"


# -- from format 1 to 2 ------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [KEPT_OF_1], indirect=True)
def test_a_vault_of_format_1_becomes_one_of_today(kept: Path) -> None:
    before = header_of(kept)
    assert before.format == 1
    Vault.open(kept, PASSPHRASE).close()
    after = header_of(kept)
    assert (after.format, after.salt, after.vault_id) == (2, before.salt, before.vault_id)
    assert after.wrapped != before.wrapped
    image = kept.read_bytes()
    Vault.open(kept, PASSPHRASE).close()
    assert kept.read_bytes() == image, "once is enough"


@pytest.mark.parametrize("kept", [KEPT_OF_1], indirect=True)
def test_a_keyring_s_vault_of_format_1_keeps_its_key(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new key in the keyring would not be undone with the transaction."""
    stored: dict[str, str] = {}
    monkeypatch.setattr("keyring.set_password", lambda service, name, key: stored.update({name: key}))
    monkeypatch.setattr("keyring.get_password", lambda service, name: stored.get(name))
    connection = sqlite3.connect(kept)
    (data,) = connection.execute("SELECT data FROM header").fetchone()
    old = Header.from_bytes(data)
    key = old.unwrap(PASSPHRASE)
    header = Header(old.vault_id, "keyring", old.salt, old.kdf, format=1)._wrap(key, None, new=True)
    connection.execute("UPDATE header SET data = ?", (header.to_bytes(),))
    connection.commit()
    connection.close()
    keys = dict(stored)
    for _ in range(2):
        with Vault.open(kept, None) as vault:
            assert versions(vault) == TWO
    assert stored == keys and header_of(kept).format == 2


@pytest.mark.parametrize("kept", [KEPT_OF_1], indirect=True)
def test_a_wrong_passphrase_migrates_nothing(kept: Path) -> None:
    before = kept.read_bytes()
    with pytest.raises(WrongPassphrase):
        Vault.open(kept, "another")
    assert kept.read_bytes() == before


@pytest.mark.parametrize("kept", [KEPT_OF_1], indirect=True)
def test_a_migration_that_fails_changes_nothing(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr("perfit_shared.shifts.read_metadata", lambda data: {}["none"])
        with pytest.raises(KeyError):
            Vault.open(kept, PASSPHRASE)
    assert header_of(kept).format == 1
    with Vault.open(kept, PASSPHRASE) as vault:
        check(vault)
        assert versions(vault) == TWO


def test_a_list_that_lacks_a_version_is_damage(kept: Path) -> None:
    with Vault.open(kept, PASSPHRASE) as vault:
        vault.delete("version", f"{CLOUD}/news_headline/2")
        with pytest.raises(VaultDamaged):
            personal.load(vault, CLOUD, ARTEFACT)
        for broken in (b"", b"[]", b'{"task": "t", "current": 3, "kept": []}'):
            vault.put("shift", f"{CLOUD}/news_headline", broken)
            with pytest.raises(VaultDamaged):
                personal.read_versions(vault, CLOUD, "news_headline")


# -- the format at hand, and later ones --------------------------------------------------------


def test_the_kept_vault_is_what_is_written_today(tmp_path: Path) -> None:
    """Or else the format changed, and wants a number of its own, and a way from the old to the new."""
    old_files.write(tmp_path / "vault.db")
    with Vault.open(tmp_path / "vault.db", PASSPHRASE) as vault:
        check(vault)
        assert versions(vault) == TWO

    def shape(path: Path) -> tuple[object, ...]:
        connection = sqlite3.connect(path)
        schema = connection.execute("SELECT name, sql FROM sqlite_schema ORDER BY name").fetchall()
        kinds = dict(connection.execute("SELECT kind, count(*) FROM rows GROUP BY kind").fetchall())
        # A second one says what the artefacts are, or which tasks there are; earlier perfits read neither.
        kinds["cloud"] = kinds["counter"] = 1
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
    later = json.dumps(json.loads(data[32:]) | {"format": 3, "what": "is new"}).encode()
    connection.execute("UPDATE header SET data = ?", (hashlib.sha256(later).digest() + later,))
    connection.executescript(more)
    connection.commit()
    connection.close()
    before = kept.read_bytes()
    for look in (lambda: Vault.open(kept, PASSPHRASE), lambda: Vault.lock_of(kept)):
        with pytest.raises(
            VaultError, match=r"format 3, .* use the version of perfit that wrote it"
        ) as raised:
            look()
        assert type(raised.value) is VaultError
    assert [file.name for file in kept.parent.iterdir()] == ["vault.db"]
    assert kept.read_bytes() == before
