"""Invites, keys, certificates."""

from __future__ import annotations

import base64
import hashlib
import random
import struct
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from perfit_device.cloud import enrolment as enrolments
from perfit_device.cloud.identity import Enrolment, Identity, identity_in, life_left
from perfit_shared.errors import InvalidInvite, InviteRefused, NotAuthenticated, VaultDamaged
from perfit_shared.invites import Invite

INVITE = Invite("cloud.example:7443", b"\x30\x82" + bytes(range(256)) * 2, 1_900_000_000, bytes(range(32)))


def test_invites_round_trip() -> None:
    text = INVITE.encode()
    assert text.startswith("perfit1-") and text.isascii() and "=" not in text
    assert Invite.decode(text) == INVITE
    assert Invite.decode(f"  {text[:100]}\n{text[100:]} \n") == INVITE
    assert "secret" not in repr(INVITE)


def test_every_altered_invite_is_refused() -> None:
    text, rng = INVITE.encode(), random.Random(0)
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_+/=é"
    for place in range(len(text)):
        other = rng.choice([c for c in alphabet if c != text[place]])
        with pytest.raises(InvalidInvite) as raised:
            Invite.decode(text[:place] + other + text[place + 1 :])
        assert "\n" not in str(raised.value)
    for cut in (0, 7, 8, 9, 20, 100, len(text) - 1):
        with pytest.raises(InvalidInvite):
            Invite.decode(text[:cut])
    for junk in ("perfit1-" + "A" * 100_000, text + "A", text + text, "perfit2-" + text[8:]):
        with pytest.raises(InvalidInvite):
            Invite.decode(junk)
    for bad in (
        Invite("", b"x", 1, bytes(32)),
        Invite("a:1", b"x", 1, b"short"),
        Invite("a:1", b"", 1, bytes(32)),
    ):
        with pytest.raises(InvalidInvite):
            bad.encode()


@pytest.mark.parametrize(
    ("expires", "address", "behind"), [(2**63, b"a:1", b""), (1, b"", b""), (1, b"a:1", b"more")]
)
def test_an_invite_that_nobody_would_make_is_refused(expires: int, address: bytes, behind: bytes) -> None:
    """Whole, and with the right checksum."""

    def made(expires: int, address: bytes, behind: bytes) -> str:
        body = struct.pack(">BQ32sH", 1, expires, bytes(32), len(address)) + address + b"\0\1x" + behind
        data = body + hashlib.sha256(body).digest()[:8]
        return "perfit1-" + base64.urlsafe_b64encode(data).decode().rstrip("=")

    assert Invite.decode(made(1, b"a:1", b"")) == Invite("a:1", b"x", 1, bytes(32))
    with pytest.raises(InvalidInvite):
        Invite.decode(made(expires, address, behind))


def test_expiry_is_seen_before_the_network() -> None:
    now = int(time.time())
    replace(INVITE, expires_unix=now + 60).check_expiry()
    day = f"{datetime.fromtimestamp(now - 60, UTC):%Y-%m-%d}"
    with pytest.raises(InviteRefused, match=f"expired on {day} .*ask the operator"):
        replace(INVITE, expires_unix=now - 60).check_expiry()


def certificate(identity: Identity, days: tuple[float, float]) -> bytes:
    now, name = datetime.now(UTC), x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "d")])
    builder = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .serial_number(1)
        .public_key(identity.key.public_key())
        .not_valid_before(now + timedelta(days=days[0]))
        .not_valid_after(now + timedelta(days=days[1]))
    )
    return builder.sign(identity.key, hashes.SHA256()).public_bytes(Encoding.DER)


def enrolment(identity: Identity, days: tuple[float, float]) -> Enrolment:
    der = certificate(identity, days)
    return Enrolment(identity, der, der, "a:1", "a:2", "c1")


def test_identity_signs_and_survives_bytes() -> None:
    identity = Identity.create()
    request = identity.csr()
    csr = x509.load_der_x509_csr(request)
    assert csr.is_signature_valid
    again = Identity.from_der(identity.to_der())
    signature = again.sign_renewal(b"n" * 32, request)
    key: Any = csr.public_key()
    key.verify(signature, b"perfit-renew-v1" + b"n" * 32 + request, ec.ECDSA(hashes.SHA256()))
    der = certificate(identity, (-1, 1))
    assert identity.matches(der) and not Identity.create().matches(der)
    assert "PRIVATE" not in repr(identity) and "key" not in repr(identity)
    with pytest.raises(VaultDamaged):
        Identity.from_der(b"junk")
    with pytest.raises(NotAuthenticated):
        life_left(b"junk")


def test_enrolments_survive_bytes() -> None:
    mine = enrolment(Identity.create(), (-1, 1))
    again = Enrolment.from_bytes(mine.to_bytes())
    assert (again.certificate, again.address, again.cloud_id) == (mine.certificate, "a:1", "c1")
    assert again.identity.to_der() == mine.identity.to_der()
    for data in (b"{}", b"junk", b'{"key": 5}'):
        with pytest.raises(VaultDamaged):
            Enrolment.from_bytes(data)


@pytest.mark.parametrize(
    ("days", "renews", "lapsed"), [((-1, 9), False, False), ((-8, 2), True, False), ((-9, -1), True, True)]
)
def test_when_a_certificate_wants_renewal(days: tuple[float, float], renews: bool, lapsed: bool) -> None:
    mine = enrolment(Identity.create(), days)
    assert enrolments.wants_renewal(mine) is renews
    assert (life_left(mine.certificate) <= 0) is lapsed


def test_a_certificate_whose_name_cannot_be_read_is_none() -> None:
    """Its name is read when it is asked for, and then it was a ValueError."""
    sound = certificate(Identity.create(), (-1, 1))
    name = x509.load_der_x509_certificate(sound).subject.public_bytes()
    broken = name.replace(b"\x06\x03\x55\x04", b"\x0d\x03\x55\x04")  # the tag of its object identifier
    assert broken != name
    with pytest.raises(NotAuthenticated):
        identity_in(sound.replace(name, broken))
