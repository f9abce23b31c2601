"""The device's key pair, what it signs, and the certificate that the cloud gives for it.

P-256 throughout: gRPC's handshake fails with Ed25519 certificates.
"""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass, field
from datetime import UTC, datetime

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_der_private_key,
)
from cryptography.x509.oid import NameOID

from perfit_shared.errors import NotAuthenticated, VaultDamaged

__all__ = ["Enrolment", "Identity", "certificate_life", "identity_in", "life_left", "pem"]

_RENEWAL_CONTEXT = b"perfit-renew-v1"


@dataclass(frozen=True)
class Identity:
    """A P-256 key pair."""

    key: ec.EllipticCurvePrivateKey = field(repr=False)

    @classmethod
    def create(cls) -> Identity:
        return cls(ec.generate_private_key(ec.SECP256R1()))

    @classmethod
    def from_der(cls, data: bytes) -> Identity:
        """Raises VaultDamaged when `data` is no P-256 key in PKCS#8."""
        try:
            key = load_der_private_key(data, password=None)
        except (ValueError, TypeError, UnsupportedAlgorithm) as error:
            raise VaultDamaged("the vault holds a key that cannot be read") from error
        if not isinstance(key, ec.EllipticCurvePrivateKey) or key.curve.name != "secp256r1":
            raise VaultDamaged("the vault holds a key of the wrong kind")
        return cls(key)

    def to_der(self) -> bytes:
        """PKCS#8, unencrypted: for the vault alone, which seals it."""
        return self.key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())

    def to_pem(self) -> bytes:
        """PKCS#8, unencrypted: the form gRPC takes."""
        return self.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())

    def csr(self) -> bytes:
        """PKCS#10, DER. The cloud reads its public key alone, so the subject says nothing."""
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "perfit device")])
        builder = x509.CertificateSigningRequestBuilder().subject_name(subject)
        return builder.sign(self.key, hashes.SHA256()).public_bytes(Encoding.DER)

    def sign_renewal(self, nonce: bytes, csr: bytes) -> bytes:
        """ECDSA-SHA256 over "perfit-renew-v1" + nonce + csr, DER."""
        return self.key.sign(_RENEWAL_CONTEXT + nonce + csr, ec.ECDSA(hashes.SHA256()))

    def matches(self, certificate: bytes) -> bool:
        """Whether the certificate (DER) is for this key. Raises NotAuthenticated when it is none."""
        try:
            theirs = _parse(certificate).public_key()
        except (ValueError, UnsupportedAlgorithm):
            return False  # a key of a kind that is unknown here is not this one
        mine = self.key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        return theirs.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo) == mine


@dataclass(frozen=True)
class Enrolment:
    """All that a device needs to talk to one cloud."""

    identity: Identity
    certificate: bytes  # DER
    server_ca: bytes  # DER: the root that the cloud's servers chain to
    address: str  # host:port of the mutual-TLS listener, or several with commas
    enrolment_address: str  # the same of the enrolment listener, where a lapsed certificate renews
    cloud_id: str  # hex
    other_server_ca: bytes = b""  # DER: while the cloud changes its root, the other one; else empty

    @property
    def server_cas(self) -> tuple[bytes, ...]:
        """DER: every root that the cloud's servers may chain to."""
        return tuple(root for root in (self.server_ca, self.other_server_ca) if root)

    @property
    def roots(self) -> bytes:
        """PEM: the same. Raises NotAuthenticated when one is none."""
        return b"".join(map(pem, self.server_cas))

    def to_bytes(self) -> bytes:
        return json.dumps(
            {
                "key": _b64(self.identity.to_der()),
                "certificate": _b64(self.certificate),
                "server_ca": _b64(self.server_ca),
                "other_server_ca": _b64(self.other_server_ca),
                "address": self.address,
                "enrolment_address": self.enrolment_address,
                "cloud_id": self.cloud_id,
            }
        ).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Enrolment:
        """Raises VaultDamaged."""
        try:
            values = json.loads(data)
            if not all(isinstance(value, str) for value in values.values()):
                raise TypeError("all of it is text")
            return cls(
                identity=Identity.from_der(base64.b64decode(values["key"])),
                certificate=base64.b64decode(values["certificate"]),
                server_ca=base64.b64decode(values["server_ca"]),
                address=values["address"],
                enrolment_address=values["enrolment_address"],
                cloud_id=values["cloud_id"],
                other_server_ca=base64.b64decode(values.get("other_server_ca", "")),
            )
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise VaultDamaged("the vault holds an enrolment that cannot be read") from error


def certificate_life(certificate: bytes) -> tuple[datetime, datetime]:
    """(not before, not after) of a DER certificate, UTC. Raises NotAuthenticated when it is none."""
    parsed = _parse(certificate)
    return parsed.not_valid_before_utc, parsed.not_valid_after_utc


def identity_in(certificate: bytes) -> str:
    """The identity that the cloud wrote into a certificate (its common name), or "".

    Raises NotAuthenticated when it is none.
    """
    names = _parse(certificate).subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(names[0].value) if names else ""


def life_left(certificate: bytes) -> float:
    """Share of a certificate's life that is left: 1 when new, 0 or less when it has lapsed."""
    start, end = certificate_life(certificate)
    return (end - datetime.now(UTC)) / (end - start)


def pem(certificate: bytes) -> bytes:
    """A DER certificate as PEM. Raises NotAuthenticated when it is none."""
    return _parse(certificate).public_bytes(Encoding.PEM)


def _parse(certificate: bytes) -> x509.Certificate:
    try:
        parsed = x509.load_der_x509_certificate(certificate)
        _ = parsed.subject  # parsed lazily, so an error shows only here
    except (ValueError, x509.InvalidVersion) as error:
        raise NotAuthenticated(
            "what should be a certificate is none; enrol again with a new invite"
        ) from error
    return parsed


def _b64(data: bytes) -> str:
    return base64.b64encode(data).decode()
