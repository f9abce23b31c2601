"""Invites, certificates and revocation: what is granted, and every way in which it is refused."""

from __future__ import annotations

import datetime
import os
import sqlite3
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.x509.oid import ExtendedKeyUsageOID
from tests.support.authority import DAY, csr_of, enrolled, new_key, open_authority

from perfit_cloud.service.identity import authority as authority_module
from perfit_cloud.service.identity import sqlite_store
from perfit_cloud.service.identity.authority import Authority
from perfit_cloud.service.identity.certificates import identity_of
from perfit_shared.errors import (
    Busy,
    CertificateExpired,
    ConfigError,
    IdentityRevoked,
    InvalidInput,
    InviteRefused,
    NotAuthenticated,
    NotFound,
    Unavailable,
)

# -- the state folder ----------------------------------------------------------------------------


def test_state_is_private_and_survives(authority: Authority, tmp_path: Path) -> None:
    state = tmp_path / "state"
    assert stat.S_IMODE(state.stat().st_mode) == 0o700
    files = {path.name: stat.S_IMODE(path.stat().st_mode) for path in state.iterdir()}
    assert files.keys() >= {"server_ca.pem", "device_ca.pem", "authority.db"}
    assert set(files.values()) == {0o600}
    again = open_authority(state)
    assert (again.cloud_id, again.server_ca_der) == (authority.cloud_id, authority.server_ca_der)
    assert again.device_ca_pem == authority.device_ca_pem


@pytest.mark.parametrize("name", ["server_ca.pem", "device_ca.pem", "authority.db"])
def test_damaged_state_is_an_error_and_stays(authority: Authority, tmp_path: Path, name: str) -> None:
    authority.close()
    path = tmp_path / "state" / name
    path.write_bytes(b"damage" + path.read_bytes()[6:])
    damaged = path.read_bytes()
    with pytest.raises(ConfigError, match=r"damaged|cannot use"):
        open_authority(tmp_path / "state")
    assert path.read_bytes() == damaged


def test_key_that_others_can_read_is_refused(authority: Authority, tmp_path: Path) -> None:
    (tmp_path / "state" / "device_ca.pem").chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        open_authority(tmp_path / "state")


def test_secrets_are_not_on_disk(authority: Authority, tmp_path: Path) -> None:
    secret, _ = authority.invite(60)
    authority.close()
    for path in (tmp_path / "state").iterdir():
        assert secret not in path.read_bytes()
        assert secret.hex().encode() not in path.read_bytes()


def test_a_call_that_outlives_the_authority_is_told_to_come_back(authority: Authority) -> None:
    """A server that stops waits for its calls only so long; what came later was an error of SQLite's."""
    certificate = enrolled(authority)
    authority.check(certificate)
    authority.close()
    with pytest.raises(Unavailable, match="stopping") as told:
        authority.check(certificate)
    assert told.value.retry_ms > 0
    with pytest.raises(Unavailable):
        authority.invite(60)


# -- enrolment -----------------------------------------------------------------------------------


def test_certificate_ignores_what_the_request_asks_for(authority: Authority) -> None:
    key = new_key()
    secret, _ = authority.invite(60)
    der = authority.enroll(secret, csr_of(key, name="localhost", san="localhost"))
    certificate = x509.load_der_x509_certificate(der)
    assert certificate.public_key() == key.public_key()
    identity = identity_of(certificate)
    assert len(identity) == 32
    assert int(identity, 16) >= 0
    extensions = {type(e.value): e.value for e in certificate.extensions}
    assert x509.SubjectAlternativeName not in extensions
    assert list(extensions[x509.ExtendedKeyUsage]) == [ExtendedKeyUsageOID.CLIENT_AUTH]
    assert extensions[x509.BasicConstraints].ca is False
    assert extensions[x509.KeyUsage].digital_signature
    assert not extensions[x509.KeyUsage].key_cert_sign
    left = certificate.not_valid_after_utc - datetime.datetime.now(datetime.UTC)
    assert abs(left.total_seconds() - DAY) < 60
    assert authority.check(certificate) == identity


def test_server_certificate_names_and_usage(authority: Authority) -> None:
    identity = authority.server_identity(["cloud.example", "10.0.0.7", "localhost", "localhost"])
    certificate = x509.load_pem_x509_certificate(identity.certificate_pem)
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["cloud.example", "localhost"]
    assert [str(ip) for ip in names.get_values_for_type(x509.IPAddress)] == ["10.0.0.7"]
    usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usage) == [ExtendedKeyUsageOID.SERVER_AUTH]
    certificate.verify_directly_issued_by(x509.load_der_x509_certificate(authority.server_ca_der))


def test_same_invite_and_key_give_the_same_certificate(authority: Authority, tmp_path: Path) -> None:
    key, (secret, _) = new_key(), authority.invite(60)
    first = authority.enroll(secret, csr_of(key))
    assert authority.enroll(secret, csr_of(key, name="other")) == first
    assert open_authority(tmp_path / "state").enroll(secret, csr_of(key)) == first
    assert len(authority.devices()) == 1


def test_used_invite_is_refused_to_another_key(authority: Authority) -> None:
    secret, _ = authority.invite(60)
    authority.enroll(secret, csr_of(new_key()))
    with pytest.raises(InviteRefused, match="another device used this invite"):
        authority.enroll(secret, csr_of(new_key()))
    assert len(authority.devices()) == 1


def test_expired_invite_is_refused(authority: Authority, clock: Callable[[float], None]) -> None:
    secret, expires = authority.invite(60)
    assert abs(expires - time.time() - 60) < 5
    clock(61)
    with pytest.raises(InviteRefused, match="expired"):
        authority.enroll(secret, csr_of(new_key()))


@pytest.mark.parametrize("change", [lambda s: s[:-1] + bytes([s[-1] ^ 1]), lambda s: s[:-1], lambda _: b""])
def test_altered_secret_is_refused(authority: Authority, change: Callable[[bytes], bytes]) -> None:
    secret, _ = authority.invite(60)
    with pytest.raises(InviteRefused, match="does not know"):
        authority.enroll(change(secret), csr_of(new_key()))
    authority.enroll(secret, csr_of(new_key()))  # the real one still works


def bad_csrs() -> dict[str, bytes]:
    good = csr_of(new_key())
    return {
        "empty": b"",
        "noise": os.urandom(200),
        "cut": good[:-5],
        "ed25519": csr_of(ed25519.Ed25519PrivateKey.generate()),
        "p384": csr_of(ec.generate_private_key(ec.SECP384R1())),
        "signature": good[:-2] + bytes([good[-2] ^ 1, good[-1]]),
        "large": good + b"\0" * 10_000,
    }


@pytest.mark.parametrize("kind", bad_csrs())
def test_bad_request_is_refused_and_spends_no_invite(authority: Authority, kind: str) -> None:
    secret, _ = authority.invite(60)
    with pytest.raises(InvalidInput):
        authority.enroll(secret, bad_csrs()[kind])
    authority.enroll(secret, csr_of(new_key()))


# -- every call, and revocation ------------------------------------------------------------------


def test_revocation_from_another_process_counts(authority: Authority, tmp_path: Path) -> None:
    certificate, other = enrolled(authority), enrolled(authority)
    identity = authority.check(certificate)
    code = (
        "import sys; from pathlib import Path; from perfit_cloud.service.identity.authority import Authority;"
        "print(Authority(Path(sys.argv[1]), certificate_seconds=9, lapse_seconds=9).revoke(sys.argv[2]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "state"), identity[:12]],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == identity
    authority.refresh()  # as a server does twice a second
    with pytest.raises(IdentityRevoked):
        authority.check(certificate)
    with pytest.raises(IdentityRevoked):
        authority.renew(certificate, csr_of(new_key()))
    authority.check(other)
    revoked = {device.identity: device.revoked for device in authority.devices()}
    assert revoked[identity]
    assert revoked[authority.check(other)] is None


def test_revoked_device_gets_nothing_from_its_invite(authority: Authority) -> None:
    key, (secret, _) = new_key(), authority.invite(60)
    certificate = x509.load_der_x509_certificate(authority.enroll(secret, csr_of(key)))
    authority.revoke(identity_of(certificate))
    with pytest.raises(IdentityRevoked):
        authority.enroll(secret, csr_of(key))


def test_revoke_wants_one_clear_identity(authority: Authority, monkeypatch: pytest.MonkeyPatch) -> None:
    names = iter(["aaaa1", "aaaa2", "bbbb3"])
    monkeypatch.setattr(authority_module, "fresh_identity", lambda: next(names))
    for _ in range(3):
        enrolled(authority)
    with pytest.raises(InvalidInput, match="more than one identity"):
        authority.revoke("aaaa")
    with pytest.raises(InvalidInput, match="at least 4"):
        authority.revoke("b")
    for nobody in ("cccc", "aaa%", "____"):
        with pytest.raises(NotFound):
            authority.revoke(nobody)
    assert [device.revoked for device in authority.devices()] == [None] * 3
    assert authority.revoke("BBBB") == "bbbb3"
    assert authority.revoke("bbbb3") == "bbbb3"


def test_expired_certificate_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    authority = open_authority(tmp_path / "state", life=60)
    certificate = enrolled(authority)
    authority.check(certificate)
    later = time.time() + 62
    monkeypatch.setattr(time, "time", lambda: later)
    with pytest.raises(CertificateExpired):
        authority.check(certificate)


def test_identity_that_is_not_in_the_database_is_refused(authority: Authority, tmp_path: Path) -> None:
    certificate = enrolled(authority)
    with sqlite3.connect(tmp_path / "state" / "authority.db") as db:
        db.execute("DELETE FROM devices")
    again = open_authority(tmp_path / "state")
    with pytest.raises(NotAuthenticated, match="does not know this device"):
        again.check(certificate)
    with pytest.raises(NotAuthenticated, match="does not know this device"):
        authority.renew(certificate, csr_of(new_key()))


def test_a_writer_that_hangs_stops_writes_but_no_checks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite_store, "_LOCK_SECONDS", 0.1)
    authority = open_authority(tmp_path / "state")
    certificate = enrolled(authority)
    other = sqlite3.connect(tmp_path / "state" / "authority.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(Busy):
        authority.invite(60)
    authority.check(certificate)
    other.execute("ROLLBACK")
    authority.invite(60)
