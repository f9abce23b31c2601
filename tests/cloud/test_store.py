"""The store in SQLite: the contract of stores, and what its file holds and does not hold."""

from __future__ import annotations

import sqlite3
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.store_contract import ANN, BOB, Opener, StoreContract, enroll, enrolment

from perfit_cloud.service.identity import sqlite_store
from perfit_cloud.service.identity.sqlite_store import SQLiteStore
from perfit_cloud.service.identity.store import IdentityState
from perfit_shared.errors import Busy, ConfigError, StoreFailed


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "authority.db"


@pytest.fixture
def open_store(path: Path) -> Iterator[Opener]:
    opened: list[SQLiteStore] = []

    def open_again() -> SQLiteStore:
        opened.append(SQLiteStore(path))
        return opened[-1]

    yield open_again
    for store in opened:
        store.close()


@pytest.fixture
def no_power_cuts(monkeypatch: pytest.MonkeyPatch) -> None:
    """So nothing waits for the disk."""
    monkeypatch.setattr(sqlite_store, "_SYNCHRONOUS", "OFF")


@pytest.fixture
def store_module() -> str:
    return sqlite_store.__name__


@pytest.mark.usefixtures("no_power_cuts")
class TestSQLiteStore(StoreContract):
    pass


def test_what_was_deleted_or_replaced_is_gone_from_the_file(path: Path, open_store: Opener) -> None:
    store = open_store()
    enroll(store, ANN)
    enroll(store, BOB)
    store.add_challenge_key(b"first key of challenges", made=1, after=0)
    store.use_challenge(1, b"hash of a used challenge")
    gone = (ANN.encode(), enrolment(ANN).certificate, b"first key of challenges", b"hash of a used challenge")
    raw = path.read_bytes()
    assert [text for text in (*gone, BOB.encode()) if text not in raw] == []
    store.write_marks({ANN: IdentityState(1)})
    assert enrolment(ANN).certificate not in path.read_bytes()
    store.renew(BOB, generation=1, issued=1, expires=2_000_000_000)
    store.prune(identities_before=1_900_000_000, invites_before=1_900_000_000)
    for after in (1, 2):
        store.add_challenge_key(b"another", made=1, after=after)
    raw = b"".join(each.read_bytes() for each in path.parent.iterdir())
    assert [text for text in gone if text in raw] == []
    assert BOB.encode() in raw


def test_a_used_challenge_tells_no_time(path: Path, open_store: Opener) -> None:
    """It begins with the time at which a lapsed device asked for it, and issue dates stay one row each."""
    from perfit_cloud.service.identity.challenges import Challenges

    challenges = Challenges(open_store())
    challenge = challenges.make()
    challenges.use(challenge)
    raw = path.read_bytes()
    assert [challenge[at : at + 8] in raw for at in (0, 8, 16)] == [False] * 3


def test_the_file_is_its_owners_alone(path: Path, open_store: Opener) -> None:
    open_store()
    assert {stat.S_IMODE(each.stat().st_mode) for each in path.parent.iterdir()} == {0o600}


def test_a_file_that_somebody_holds_or_damaged_is_told_so(
    path: Path, open_store: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite_store, "_LOCK_SECONDS", 0.1)
    store = open_store()
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    for call in (store.devices, lambda: store.add_invite(b"x", 1), open_store):
        with pytest.raises(Busy) as told:
            call()
        assert told.value.retry_ms > 0
    other.close()
    store.add_invite(b"x", 1)
    path.write_bytes(b"damage" * 1000)
    with pytest.raises(StoreFailed, match=r"malformed|not a database"):
        store.devices()
    with pytest.raises(StoreFailed):
        open_store()


# -- formats -----------------------------------------------------------------------------------------

FORMAT_2 = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE invites (
    secret_hash BLOB PRIMARY KEY, expires INTEGER NOT NULL, used INTEGER NOT NULL DEFAULT 0
) WITHOUT ROWID;
CREATE TABLE enrolments (
    identity TEXT PRIMARY KEY, secret_hash BLOB NOT NULL UNIQUE, key_hash BLOB NOT NULL,
    certificate BLOB NOT NULL
) WITHOUT ROWID;
CREATE TABLE devices (
    identity TEXT PRIMARY KEY, issued INTEGER NOT NULL, expires INTEGER NOT NULL, generation INTEGER NOT NULL,
    used INTEGER NOT NULL, revoked INTEGER, superseded INTEGER
) WITHOUT ROWID;
INSERT INTO meta VALUES ('format', '2'), ('cloud_id', 'c1');
INSERT INTO invites VALUES (x'01', 500, 0), (x'02', 500, 1);
INSERT INTO enrolments VALUES ('abab', x'02', x'03', x'04');
INSERT INTO devices VALUES ('aaaa', 5, 9, 4, 3, 8, 86400), ('abab', 6, 10, 1, -1, NULL, NULL);
"""


TO_FORMAT_3 = """
ALTER TABLE devices ADD COLUMN sequence INTEGER NOT NULL DEFAULT 1;
CREATE TABLE challenge_keys (number INTEGER PRIMARY KEY, key BLOB NOT NULL, made INTEGER NOT NULL);
CREATE TABLE challenges (hash BLOB PRIMARY KEY, key_number INTEGER NOT NULL) WITHOUT ROWID;
INSERT INTO meta VALUES ('sequence', '1'), ('pruned', '0');
UPDATE meta SET value = '3' WHERE key = 'format';
"""


@pytest.mark.parametrize("script", [FORMAT_2, FORMAT_2 + TO_FORMAT_3])
def test_a_file_of_an_earlier_format_is_taken_over(path: Path, open_store: Opener, script: str) -> None:
    with sqlite3.connect(path) as db:
        db.executescript(script)
    path.chmod(0o600)
    store = open_store()
    assert store.setting("cloud_id", "new") == "c1"
    changes = store.changes(0)
    assert changes.states == {"aaaa": IdentityState(3, True, 86400), "abab": IdentityState(-1)}
    unused, used = store.invite(b"\1"), store.invite(b"\2")
    assert unused is not None
    assert (unused.expires, unused.is_used) == (500, False)
    assert used is not None
    assert used.enrolment is not None
    assert (used.enrolment.identity, used.enrolment.certificate) == ("abab", b"\4")
    assert [device.label for device in store.devices()] == ["", ""]
    assert [invite.label for invite in store.open_invites()] == [""]
    assert store.renew("abab", generation=0, issued=7, expires=11) == 2
    store.revoke("abab", 12)
    assert store.changes(changes.sequence).states == {"abab": IdentityState(-1, True)}
    store.add_challenge_key(b"key", made=1, after=0)
    assert store.use_challenge(1, b"x")
    assert open_store().devices() == store.devices()


@pytest.mark.parametrize("found", ["0", "5", "x"])
def test_another_format_is_refused(path: Path, open_store: Opener, found: str) -> None:
    open_store().close()
    with sqlite3.connect(path) as db:
        db.execute("UPDATE meta SET value = ? WHERE key = 'format'", (found,))
    with pytest.raises(ConfigError, match="another version"):
        open_store()


def test_what_is_half_made_is_not_there(
    path: Path, open_store: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An invite must not be spent on an identity that could not be written."""
    store = open_store()
    enroll(store, ANN)
    store.add_invite(b"x", 1)
    with pytest.raises(StoreFailed):
        store.enroll(b"x", enrolment(ANN), issued=1, expires=2)  # there is one of that name
    state = store.invite(b"x")
    assert state is not None
    assert not state.is_used
