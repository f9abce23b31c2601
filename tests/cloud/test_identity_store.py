"""What is written about devices and invites: nothing else, nothing older, and nothing lost to a clock."""

from __future__ import annotations

import datetime
import json
import shutil
import sqlite3
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from tests.support.authority import DAY, csr_of, enrolled, new_key, open_authority, renewed

from perfit_cloud.service.identity.authority import Authority
from perfit_cloud.service.identity.certificates import identity_of
from perfit_cloud.service.identity.sqlite_store import SQLiteStore
from perfit_cloud.service.identity.store import Enrolment, IdentityState
from perfit_cloud.service.state_folder import only_server
from perfit_shared.errors import CertificateSuperseded, ConfigError, InvalidInput, InviteRefused

FORMAT_1 = Path(__file__).parent / "data" / "state_format_1"


def written(state: Path) -> bytes:
    """All bytes of the folder, files of SQLite beside the database included."""
    return b"".join(path.read_bytes() for path in sorted(state.iterdir()))


# -- what stands in the folder's files ---------------------------------------------------------------


def test_earlier_dates_of_a_device_stand_nowhere(
    authority: Authority, tmp_path: Path, wrong_clock: Callable[[float], None]
) -> None:
    """The write-ahead log kept when each of seven certificates was issued: when somebody was there."""
    certificate, dates = enrolled(authority), []
    authority.check(certificate)
    for day in range(7):
        device = authority.devices()[0]
        dates += [device.issued, device.expires]
        wrong_clock(3600 * (day + 1))
        certificate = renewed(authority, certificate)
        authority.check(certificate)
        authority.refresh()
    newest = authority.devices()[0]
    raw = written(tmp_path / "state")
    assert struct.pack(">I", newest.issued) in raw
    assert [date for date in dates if struct.pack(">I", date) in raw] == []


def test_no_invite_leads_to_an_identity_that_was_used(authority: Authority, tmp_path: Path) -> None:
    key, (secret, _) = new_key(), authority.invite(60, "Ann")
    der = authority.enroll(secret, csr_of(key))
    spki = key.public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    pieces = [der[at : at + 16] for at in range(0, len(der) - 16, 16)]
    assert der in written(tmp_path / "state")  # to answer again, should the reply be lost
    authority.check(x509.load_der_x509_certificate(der))
    authority.refresh()
    raw = written(tmp_path / "state")
    own = authority.devices()[0].identity.encode() + authority.server_ca_der
    assert [piece for piece in pieces if piece in raw and piece not in own] == []
    assert spki[-64:] not in raw
    with sqlite3.connect(tmp_path / "state" / "authority.db") as db:
        tables = {name for (name,) in db.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")}
        rows = db.execute("SELECT * FROM invites").fetchall()
        assert db.execute("SELECT count(*) FROM enrolments").fetchone() == (0,)
    assert tables == {"meta", "invites", "enrolments", "devices", "challenge_keys", "challenges"}
    assert len(rows) == 1
    assert rows[0][2:] == (1, "")  # hash, end, used, and no label


def test_many_changes_leave_no_copies_of_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that move between pages may stay behind in a page's free space."""
    monkeypatch.setattr("perfit_cloud.service.identity.sqlite_store._SYNCHRONOUS", "OFF")  # nobody cuts power
    store = SQLiteStore(tmp_path / "authority.db")
    dates: dict[str, int] = {}
    gone = []
    for n in range(600):
        now = 1_700_000_000 + 977 * n
        for identity in (f"{n * 7919 % 600:032x}", f"{n * 104_729 % 600:032x}"):
            ends = now + (n % 5) * DAY
            if identity in dates:
                gone.append(dates[identity])
                store.renew(identity, generation=0, issued=now, expires=ends)
            else:
                secret_hash = now.to_bytes(32, "big")
                store.add_invite(secret_hash, 0)
                store.enroll(secret_hash, Enrolment(identity, b"", b"c" * 40), issued=now, expires=ends)
            store.write_marks({identity: IdentityState(n * n)})
            dates[identity] = now
            now += 1
        if n % 50 == 49:
            store.prune(identities_before=now, invites_before=now)
            left = {device.identity for device in store.devices()}
            gone += [dates.pop(identity) for identity in set(dates) - left]
    kept = {device.issued for device in store.devices()}
    raw = written(tmp_path)
    assert len(gone) > 400
    assert [issued for issued in gone if issued not in kept and struct.pack(">I", issued) in raw] == []
    assert all(struct.pack(">I", issued) in raw for issued in kept)


# -- clocks ------------------------------------------------------------------------------------------


def test_a_clock_that_is_ahead_deletes_nothing(
    authority: Authority, wrong_clock: Callable[[float], None]
) -> None:
    """40 days ahead, one `invite` deleted every device."""
    certificate = enrolled(authority)
    authority.check(certificate)
    unused = authority.invite(60)[0]
    for days in (40, 4000):
        wrong_clock(days * DAY)
        authority.invite(60)
        enrolled(authority)
        authority.refresh()
    wrong_clock(0)
    assert authority.check(certificate) == identity_of(certificate)
    authority.enroll(unused, csr_of(new_key()))
    assert len(authority.devices()) == 4


def test_prune_takes_the_day_from_the_operator(
    authority: Authority, wrong_clock: Callable[[float], None]
) -> None:
    today = datetime.datetime.now(datetime.UTC).date()
    wrong_clock(-40 * DAY)
    old = enrolled(authority)
    authority.check(old)
    authority.refresh()
    wrong_clock(0)
    fresh, unused = enrolled(authority), authority.invite(DAY)[0]
    assert authority.prune(today - datetime.timedelta(days=30)) == (0, 1)
    assert authority.prune(today) == (1, 0)
    assert [device.identity for device in authority.devices()] == [identity_of(fresh)]
    assert identity_of(old) != identity_of(fresh)
    authority.enroll(unused, csr_of(new_key()))
    with pytest.raises(InvalidInput, match="still to come"):
        authority.prune(today + datetime.timedelta(days=2))
    assert len(authority.devices()) == 2


def test_an_answer_that_was_not_fetched_yet_is_not_pruned(
    authority: Authority, wrong_clock: Callable[[float], None]
) -> None:
    wrong_clock(-10 * DAY)
    key, (secret, _) = new_key(), authority.invite(60)
    der = authority.enroll(secret, csr_of(key))
    wrong_clock(0)
    assert authority.prune(datetime.datetime.now(datetime.UTC).date()) == (0, 0)
    assert authority.enroll(secret, csr_of(key)) == der


# -- formats -----------------------------------------------------------------------------------------


@pytest.fixture
def old_state(tmp_path: Path) -> Iterator[Path]:
    """A state folder that perfit-cloud wrote before there were generations: see its README."""
    state = tmp_path / "old"
    shutil.copytree(FORMAT_1, state)
    for path in (state, *state.iterdir()):
        path.chmod(0o700 if path.is_dir() else 0o600)
    return state


def test_a_state_folder_of_format_1_is_taken_over(old_state: Path) -> None:
    made = json.loads((old_state / "made.json").read_text("utf-8"))
    certificates = {
        name: x509.load_der_x509_certificate(bytes.fromhex(der)) for name, der in made["certificates"].items()
    }
    authority = open_authority(old_state)
    assert authority.cloud_id == made["cloud_id"]
    devices = {device.identity: device for device in authority.devices()}
    assert {name: devices[identity_of(c)].revoked is None for name, c in certificates.items()} == {
        "used": True,
        "unused": True,
        "revoked": False,
    }
    used = certificates["used"]
    assert devices[identity_of(used)].expires == int(used.not_valid_after_utc.timestamp())
    authority.check(used)
    new = renewed(authority, used)
    authority.check(used)
    authority.check(new)
    with pytest.raises(CertificateSuperseded):
        authority.check(used)
    # An answer that was lost on the way when the cloud was stopped for the new version.
    key = serialization.load_pem_private_key(made["unused_key"].encode(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    secrets = {name: bytes.fromhex(secret) for name, secret in made["secrets"].items()}
    assert authority.enroll(secrets["unused"], csr_of(key)).hex() == made["certificates"]["unused"]
    with pytest.raises(InviteRefused, match="another device"):
        authority.enroll(secrets["unused"], csr_of(new_key()))
    authority.enroll(secrets["open"], csr_of(new_key()))
    authority.close()
    assert open_authority(old_state).cloud_id == made["cloud_id"]


def test_no_state_folder_is_taken_over_from_under_a_server(old_state: Path) -> None:
    """A server of the version before could not write to the new tables: no device could enrol any more."""
    with only_server(old_state), pytest.raises(ConfigError, match="restart it first"):
        open_authority(old_state)
    database = sqlite3.connect(old_state / "authority.db")
    assert database.execute("SELECT value FROM meta WHERE key = 'format'").fetchone() == ("1",)
    database.close()
    open_authority(old_state).close()


def test_what_format_1_kept_is_gone_once_it_was_taken_over(old_state: Path) -> None:
    made = json.loads((old_state / "made.json").read_text("utf-8"))
    (old_state / "made.json").unlink()
    used = bytes.fromhex(made["certificates"]["used"])
    assert (old_state / "authority.db-wal").exists()
    assert used in written(old_state)
    authority = open_authority(old_state)
    authority.check(x509.load_der_x509_certificate(used))
    authority.refresh()
    authority.close()
    assert used[-64:] not in written(old_state)
    assert not (old_state / "authority.db-wal").exists()


def test_a_format_of_later_is_refused_and_stays(authority: Authority, tmp_path: Path) -> None:
    authority.close()
    path = tmp_path / "state" / "authority.db"
    with sqlite3.connect(path) as db:
        db.execute("UPDATE meta SET value = '5' WHERE key = 'format'")
    before = path.read_bytes()
    with pytest.raises(ConfigError, match="another version"):
        open_authority(tmp_path / "state")
    assert path.read_bytes() == before
