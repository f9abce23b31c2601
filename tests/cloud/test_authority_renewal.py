"""Renewal of certificates, lapsed ones too: what is granted, and every way in which it is refused."""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from tests.support.authority import DAY, Key, csr_of, enrolled, new_key, open_authority

from perfit_cloud.service.identity.authority import Authority
from perfit_cloud.service.identity.certificates import identity_of
from perfit_cloud.service.identity.server_credentials import ServerCredentials
from perfit_cloud.service.identity.server_files import SERVER_IDENTITY, ServerFiles
from perfit_shared.errors import (
    CertificateExpired,
    CertificateSuperseded,
    CertificateValid,
    IdentityRevoked,
    InvalidInput,
    InviteRefused,
    NotAuthenticated,
)


def test_renewal_keeps_the_identity(authority: Authority) -> None:
    old, key = enrolled(authority), new_key()
    new = x509.load_der_x509_certificate(authority.renew(old, csr_of(key)))
    assert identity_of(new) == identity_of(old)
    assert new.public_key() == key.public_key()
    assert len(authority.devices()) == 1
    authority.check(old)  # the reply may have got lost


class Lapsed:
    """A device whose certificate has ended, and what it would send."""

    def __init__(self, authority: Authority) -> None:
        self.key = new_key()
        self.certificate = enrolled(authority, self.key).public_bytes(serialization.Encoding.DER)
        self.csr = csr_of(new_key())
        self.nonce = authority.challenge()

    def sign(self, *, context: bytes = b"perfit-renew-v1", key: Key | None = None) -> bytes:
        return (key or self.key).sign(context + self.nonce + self.csr, ec.ECDSA(hashes.SHA256()))

    def request(self) -> dict[str, bytes]:
        return {
            "certificate": self.certificate,
            "nonce": self.nonce,
            "signature": self.sign(),
            "csr": self.csr,
        }


@pytest.fixture
def short(tmp_path: Path) -> Authority:
    """Its certificates have ended when they are made."""
    return open_authority(tmp_path / "short", life=-1)


def test_lapsed_certificate_is_renewed(short: Authority) -> None:
    lapsed = Lapsed(short)
    old = x509.load_der_x509_certificate(lapsed.certificate)
    with pytest.raises(CertificateExpired):
        short.check(old)
    new = x509.load_der_x509_certificate(short.renew_lapsed(**lapsed.request()))
    assert identity_of(new) == identity_of(old)
    assert new.public_key() != old.public_key()


def test_a_certificate_that_has_not_lapsed_is_renewed_by_itself_alone(authority: Authority) -> None:
    """Whoever has it can call; by signature it was renewed as well, past every bound on calls."""
    lapsed = Lapsed(authority)
    with pytest.raises(CertificateValid, match="mutual TLS"):
        authority.renew_lapsed(**lapsed.request())
    assert [device.revoked for device in authority.devices()] == [None]
    authority.renew(x509.load_der_x509_certificate(lapsed.certificate), lapsed.csr)


def test_a_certificate_of_a_clock_that_was_ahead_is_renewed(
    authority: Authority, wrong_clock: Callable[[float], None]
) -> None:
    """No listener takes it for as long as the clock was ahead, so by signature is the only way."""
    wrong_clock(40 * DAY)
    lapsed = Lapsed(authority)
    old = x509.load_der_x509_certificate(lapsed.certificate)
    authority.check(old)
    wrong_clock(0)
    with pytest.raises(NotAuthenticated, match="not valid yet"):
        authority.check(old)
    lapsed.nonce = authority.challenge()
    new = x509.load_der_x509_certificate(authority.renew_lapsed(**lapsed.request()))
    assert authority.check(new) == identity_of(old)


def test_the_end_that_is_measured_is_true_of_servers_that_nobody_calls(
    authority: Authority, tmp_path: Path, clock: Callable[[float], None]
) -> None:
    """Certificates were replaced at handshakes alone, so those of quiet servers seemed to run out."""

    def days_left(credentials: ServerCredentials) -> float:
        return (credentials.ends_at() - time.time()) / DAY

    files = ServerFiles(tmp_path)
    authority.write_serving_files(tmp_path, ["localhost"])
    own = ServerCredentials(lambda: authority.server_identity(["localhost"]), authority.servers.is_current)
    replica = ServerCredentials(files.identity, files.is_current)
    clock(4 * DAY)
    assert 2.9 < days_left(replica) < 3.1  # as a renewal that fails is seen
    authority.write_serving_files(tmp_path, ["localhost"])  # as a renewal does
    assert days_left(replica) > 6.9
    clock(50 * DAY)
    assert days_left(own) > 89
    (tmp_path / SERVER_IDENTITY).unlink()
    assert -40 < days_left(replica) < -38  # and the page can still be read


def test_challenge_is_good_once_and_for_a_minute(short: Authority, clock: Callable[[float], None]) -> None:
    lapsed = Lapsed(short)
    short.renew_lapsed(**lapsed.request())
    with pytest.raises(NotAuthenticated, match="used already"):
        short.renew_lapsed(**lapsed.request())
    lapsed.nonce = short.challenge()
    clock(62)
    with pytest.raises(NotAuthenticated, match="challenge has expired"):
        short.renew_lapsed(**lapsed.request())


def test_a_clock_that_jumps_makes_no_used_challenge_a_fresh_one(
    short: Authority, wrong_clock: Callable[[float], None]
) -> None:
    """An hour ahead it was forgotten, and set back again it was of this minute."""
    lapsed = Lapsed(short)
    short.renew_lapsed(**lapsed.request())
    wrong_clock(3600)
    short.renew_lapsed(**Lapsed(short).request())
    wrong_clock(0)
    with pytest.raises(NotAuthenticated, match="used already"):
        short.renew_lapsed(**lapsed.request())


def test_a_challenge_holds_across_a_restart_and_stays_used(short: Authority, tmp_path: Path) -> None:
    """Used ones were kept in memory, so that a restart took every challenge that was under way with it."""
    lapsed = Lapsed(short)
    other = Lapsed(short)
    short.renew_lapsed(**other.request())
    short.close()
    again, second = (open_authority(tmp_path / "short", life=-1) for _ in range(2))
    again.renew_lapsed(**lapsed.request())
    for used in (lapsed, other):
        with pytest.raises(NotAuthenticated, match="used already"):
            second.renew_lapsed(**used.request())


def test_strangers_write_nothing_and_wait_for_no_writer(short: Authority, tmp_path: Path) -> None:
    """The enrolment listener takes calls of anybody. Every guess at an invite took the database's lock."""
    lapsed = Lapsed(short)
    own = lapsed.request()
    stranger = open_authority(tmp_path / "other", life=-1)
    foreign = enrolled(stranger, lapsed.key).public_bytes(serialization.Encoding.DER)
    path = tmp_path / "short" / "authority.db"
    before = path.read_bytes()
    writer = sqlite3.connect(path, isolation_level=None)
    writer.execute("BEGIN IMMEDIATE")
    for _ in range(20):
        assert len(short.challenge()) == 32
        with pytest.raises(InviteRefused):
            short.enroll(os.urandom(32), csr_of(new_key()))
        for bad in ({"certificate": foreign}, {"signature": b"x"}, {"nonce": os.urandom(32)}):
            with pytest.raises(NotAuthenticated):
                short.renew_lapsed(**{**own, **bad})
    writer.close()
    assert path.read_bytes() == before
    short.renew_lapsed(**own)
    assert path.read_bytes() != before


def test_a_retired_certificate_uses_up_no_challenge(short: Authority, tmp_path: Path) -> None:
    """Each of its refused renewals left a row; when there were too many, honest devices had to wait."""
    lapsed = Lapsed(short)
    new_key_of_device = new_key()
    lapsed.csr = csr_of(new_key_of_device)
    new = short.renew_lapsed(**lapsed.request())
    newer = Lapsed(short)  # only for the form of what is sent
    newer.key, newer.certificate, newer.nonce = new_key_of_device, new, short.challenge()
    short.renew_lapsed(**newer.request())  # the first use of the new certificate retires the old one

    def used() -> int:
        database = sqlite3.connect(tmp_path / "short" / "authority.db")
        (count,) = database.execute("SELECT count(*) FROM challenges").fetchone()
        database.close()
        return int(count)

    before = used()
    for _ in range(3):
        lapsed.nonce = short.challenge()
        with pytest.raises(CertificateSuperseded):
            short.renew_lapsed(**lapsed.request())
    assert used() == before > 0


def test_challenges_that_we_did_not_make_are_refused(short: Authority, tmp_path: Path) -> None:
    lapsed = Lapsed(short)
    real = lapsed.nonce
    later = (int(time.time()) + 3600).to_bytes(8, "big") + real[8:]
    for nonce in (
        b"",
        os.urandom(32),
        real[:-1],
        real + b"\0",
        later,
        open_authority(tmp_path / "x").challenge(),
    ):
        lapsed.nonce = nonce
        with pytest.raises(NotAuthenticated, match="challenge"):
            short.renew_lapsed(**lapsed.request())
    lapsed.nonce = real
    short.renew_lapsed(**lapsed.request())


def test_a_challenge_is_compared_in_constant_time(
    short: Authority, compared: list[tuple[bytes, bytes]]
) -> None:
    lapsed = Lapsed(short)
    tag = lapsed.nonce[16:]
    lapsed.nonce = lapsed.nonce[:16] + bytes(16)
    with pytest.raises(NotAuthenticated, match="challenge"):
        short.renew_lapsed(**lapsed.request())
    assert (tag, bytes(16)) in compared


def test_renewal_needs_the_old_key_and_our_words(short: Authority) -> None:
    lapsed = Lapsed(short)
    good = lapsed.request()
    forged = [lapsed.sign(key=new_key()), lapsed.sign(context=b""), b"", os.urandom(71)]
    for signature in forged:
        with pytest.raises(NotAuthenticated, match="not signed"):
            short.renew_lapsed(**{**good, "signature": signature})
    with pytest.raises(NotAuthenticated, match="not signed"):  # a request swapped on the way
        short.renew_lapsed(**{**good, "csr": csr_of(new_key())})
    short.renew_lapsed(**good)  # none of these spent the challenge


def test_foreign_certificates_are_not_renewed(short: Authority, tmp_path: Path) -> None:
    lapsed = Lapsed(short)
    other = open_authority(tmp_path / "other")
    foreign = enrolled(other, lapsed.key).public_bytes(serialization.Encoding.DER)
    for certificate in (foreign, short.server_ca_der, b"", b"noise"):
        with pytest.raises(NotAuthenticated):
            short.renew_lapsed(**{**lapsed.request(), "certificate": certificate})


def test_certificates_and_requests_that_are_only_nearly_some(short: Authority) -> None:
    """Names are read when they are asked for, keys too, and versions are an error of their own kind."""
    lapsed = Lapsed(short)
    sound = lapsed.certificate
    name = x509.load_der_x509_certificate(sound).subject.public_bytes()
    for altered in (
        sound.replace(name, name.replace(b"\x06\x03\x55\x04", b"\x0d\x03\x55\x04")),
        sound.replace(b"\x2a\x86\x48\xce\x3d\x02\x01", b"\x2a\x86\x48\xce\x3d\x02\x00"),
        sound.replace(b"\xa0\x03\x02\x01\x02", b"\xa0\x03\x02\x01\x05"),
    ):
        assert altered != sound
        with pytest.raises(NotAuthenticated):
            short.renew_lapsed(**{**lapsed.request(), "certificate": altered})
    request = csr_of(new_key()).replace(b"\x02\x01\x00", b"\x02\x01\x01", 1)
    with pytest.raises(InvalidInput):
        short.enroll(short.invite(60)[0], request)


def test_server_certificate_is_not_renewed_as_a_device(short: Authority) -> None:
    lapsed = Lapsed(short)
    identity = short.server_identity(["localhost"])
    key = serialization.load_pem_private_key(identity.key_pem, None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    lapsed.key = key
    server = x509.load_pem_x509_certificate(identity.certificate_pem)
    lapsed.certificate = server.public_bytes(serialization.Encoding.DER)
    with pytest.raises(NotAuthenticated, match="did not issue"):
        short.renew_lapsed(**lapsed.request())


def test_revoked_device_is_not_renewed(short: Authority) -> None:
    lapsed = Lapsed(short)
    short.revoke(identity_of(x509.load_der_x509_certificate(lapsed.certificate)))
    with pytest.raises(IdentityRevoked):
        short.renew_lapsed(**lapsed.request())


def test_lapse_has_an_end(tmp_path: Path) -> None:
    authority = open_authority(tmp_path / "state", life=-3, lapse=1)
    lapsed = Lapsed(authority)
    with pytest.raises(CertificateExpired, match="lapsed more than"):
        authority.renew_lapsed(**lapsed.request())
