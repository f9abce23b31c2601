"""A state folder that moves into PostgreSQL: everything, once, and never half."""

from __future__ import annotations

import shutil
import sqlite3
from pathlib import Path

import pytest
from cryptography import x509
from tests.support.authority import DAY, csr_of, enrolled, new_key, open_authority, renewed

from local_postgres import MISSING, server_programs
from perfit_cloud.service.identity.authority import Authority
from perfit_cloud.service.identity.certificates import identity_of
from perfit_cloud.service.state_folder import only_server
from perfit_shared.errors import CertificateSuperseded, ConfigError, IdentityRevoked, StoreFailed

psycopg = pytest.importorskip("psycopg", reason="psycopg is not installed")
pytestmark = pytest.mark.skipif(server_programs() is None, reason=MISSING)

from perfit_cloud.service.identity import migration  # noqa: E402 - needs psycopg

FORMAT_1 = Path(__file__).parent / "data" / "state_format_1"


def moved(state: Path, database: str) -> Authority:
    return Authority(state, certificate_seconds=DAY, lapse_seconds=DAY, database=database, refuse_after=30)


def test_who_was_enrolled_invited_or_revoked_still_is(tmp_path: Path, database: str) -> None:
    state = tmp_path / "state"
    before = open_authority(state)
    kept, gone = enrolled(before), enrolled(before)
    newer = renewed(before, kept)
    before.check(newer)
    before.revoke(identity_of(gone))
    before.set_label(identity_of(kept), "Ann")
    open_secret = before.invite(600, "Bob")[0]
    key, answered = new_key(), before.invite(600)[0]
    certificate = before.enroll(answered, csr_of(key))
    challenge, used = before.challenge(), before.challenge()
    before._challenges.use(used)
    before.refresh()
    devices, invites, cloud_id = before.devices(), before.open_invites(), before.cloud_id
    before.close()

    counts = migration.move(state, database)
    assert (counts["devices"], counts["invites"]) == (3, 4)
    after = moved(state, database)
    assert (after.devices(), after.open_invites(), after.cloud_id) == (devices, invites, cloud_id)
    after.check(newer)
    with pytest.raises(CertificateSuperseded):
        after.check(kept)
    with pytest.raises(IdentityRevoked):
        after.check(gone)
    assert after.enroll(answered, csr_of(key)) == certificate  # a reply that was lost
    after.check(x509.load_der_x509_certificate(after.enroll(open_secret, csr_of(new_key()))))
    after._challenges.use(challenge)
    with pytest.raises(Exception, match="used already"):
        after._challenges.use(used)
    after.revoke(identity_of(newer))
    with pytest.raises(IdentityRevoked):
        after.check(newer)
    after.close()
    # Nobody goes on with the file by mistake.
    with pytest.raises(ConfigError, match="moved to PostgreSQL"):
        open_authority(state)


def test_a_move_that_was_cut_short_is_finished_by_another(
    tmp_path: Path, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = tmp_path / "state"
    authority = open_authority(state)
    enrolled(authority)
    authority.close()
    copy = migration._copy

    class Cut(Exception):
        pass

    def cut(*arguments: object) -> dict[str, int]:
        copy(*arguments)  # type: ignore[arg-type]
        raise Cut

    monkeypatch.setattr(migration, "_copy", cut)
    with pytest.raises(Cut):
        migration.move(state, database)
    monkeypatch.undo()
    open_authority(state).close()  # nothing has changed
    shutil.copytree(state, tmp_path / "before_the_mark")
    assert migration.move(state, database)["devices"] == 1
    # Cut between the transaction and the mark.
    assert migration.move(tmp_path / "before_the_mark", database)["devices"] == 1
    with pytest.raises(ConfigError, match="moved to PostgreSQL"):
        open_authority(tmp_path / "before_the_mark")


def test_no_cloud_is_moved_over_another_nor_from_under_a_server(tmp_path: Path, database: str) -> None:
    for name in ("first", "second"):
        authority = open_authority(tmp_path / name)
        enrolled(authority)
        authority.close()
    with only_server(tmp_path / "first"), pytest.raises(ConfigError, match="stop it first"):
        migration.move(tmp_path / "first", database)
    migration.move(tmp_path / "first", database)
    with pytest.raises(ConfigError, match="already"):
        migration.move(tmp_path / "second", database)
    open_authority(tmp_path / "second").close()
    with pytest.raises(ConfigError, match="holds no"):
        migration.move(tmp_path, database)


def test_an_invite_made_meanwhile_is_waited_for(tmp_path: Path, database: str) -> None:
    state = tmp_path / "state"
    open_authority(state).close()
    other = sqlite3.connect(state / "authority.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises((StoreFailed, Exception), match=r"in use|locked"):
        migration.move(state, database)
    other.execute("ROLLBACK")
    migration.move(state, database)


def test_the_oldest_format_is_moved_too(tmp_path: Path, database: str) -> None:
    state = tmp_path / "state"
    shutil.copytree(FORMAT_1, state)
    state.chmod(0o700)
    for path in state.iterdir():
        path.chmod(0o600)
    assert migration.move(state, database)["devices"] > 0
    moved(state, database).close()
