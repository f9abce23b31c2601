"""The keys that calls are sealed to: X25519 with ML-KEM-768, certified by the server CA.

Who records a call today cannot open it with a quantum computer later: that takes both halves. A key lives in
the memory of one process for hours and is written nowhere, so what was sealed to it cannot be opened once it
is gone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Protocol

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey, MLKEM768PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hpke import MLKEM768X25519PrivateKey, MLKEM768X25519PublicKey
from cryptography.x509.oid import NameOID

from perfit_shared.errors import NotAuthenticated

__all__ = [
    "MLKEM_HALF",
    "SEALING_USAGE",
    "EvidenceVerifier",
    "PrivateSealingKey",
    "PublicSealingKey",
    "SealingKey",
    "is_key_id",
]

# Arcs of a random UUID (X.667): nobody has to assign them.
_ARC = "2.25.166477258738450415955373808162951610210"
MLKEM_HALF = x509.ObjectIdentifier(f"{_ARC}.1")  # a critical extension: no other use can overlook it
SEALING_USAGE = x509.ObjectIdentifier(f"{_ARC}.2")  # no TLS server's, so that neither can pose as the other
_LONGEST_ID = 64  # characters
_CERTIFICATE_CAP = 8192  # bytes; a real one has about 1,700


@dataclass(frozen=True)
class PublicSealingKey:
    """Both halves."""

    x25519: X25519PublicKey
    mlkem: MLKEM768PublicKey

    @property
    def hpke(self) -> MLKEM768X25519PublicKey:
        return MLKEM768X25519PublicKey(self.mlkem, self.x25519)

    @property
    def binding(self) -> bytes:
        """SHA-256 over both halves, X25519 first: what evidence about a machine is bound to."""
        return hashlib.sha256(self.x25519.public_bytes_raw() + self.mlkem.public_bytes_raw()).digest()


@dataclass(frozen=True, repr=False)
class PrivateSealingKey:
    """Both halves. Nothing writes them anywhere."""

    x25519: X25519PrivateKey
    mlkem: MLKEM768PrivateKey

    @classmethod
    def generate(cls) -> PrivateSealingKey:
        return cls(X25519PrivateKey.generate(), MLKEM768PrivateKey.generate())

    @property
    def hpke(self) -> MLKEM768X25519PrivateKey:
        return MLKEM768X25519PrivateKey(self.mlkem, self.x25519)

    @property
    def public(self) -> PublicSealingKey:
        return PublicSealingKey(self.x25519.public_key(), self.mlkem.public_key())


@dataclass(frozen=True)
class SealingKey:
    """A key that the server CA vouches for."""

    key_id: str  # travels in the clear, so that a front can route by it
    public: PublicSealingKey
    starts: datetime
    ends: datetime

    @classmethod
    def from_certificate(cls, data: bytes, *server_cas: bytes) -> SealingKey:
        """The key of a certificate (DER), checked against its issuer, whatever its dates.

        `server_cas`: DER; several while a cloud changes its root. Raises NotAuthenticated when none of them
        issued it, or not for this.
        """
        try:
            certificate = _issued(data, server_cas)
            names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
            usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage)
            half = certificate.extensions.get_extension_for_oid(MLKEM_HALF)
            key = certificate.public_key()
            if (
                list(usage.value) != [SEALING_USAGE]
                or not isinstance(key, X25519PublicKey)
                or not isinstance(half.value, x509.UnrecognizedExtension)
                or len(names) != 1
            ):
                raise ValueError("another use")
            mlkem = MLKEM768PublicKey.from_public_bytes(half.value.value)
            key_id = str(names[0].value)
        except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm, x509.InvalidVersion) as error:
            raise _not_one() from error
        except x509.ExtensionNotFound as error:
            raise _not_one() from error
        if not is_key_id(key_id):
            raise _not_one()
        starts, ends = certificate.not_valid_before_utc, certificate.not_valid_after_utc
        return cls(key_id, PublicSealingKey(key, mlkem), starts, ends)

    def is_current(self) -> bool:
        """By this machine's clock."""
        return self.starts <= datetime.now(UTC) < self.ends


class EvidenceVerifier(Protocol):
    """Whoever can tell by a report of hardware what runs where a key is.

    perfit has none of its own yet, and claims nothing of machines. Who sets one on a device has every key
    refused that comes without evidence it accepts.
    """

    def verify(self, evidence: bytes, binding: bytes) -> None:
        """Raises NotAuthenticated unless `evidence` is good, and bound to this `PublicSealingKey.binding`."""
        ...


def is_key_id(text: str) -> bool:
    """Whether it can stand in gRPC's metadata, and in a proxy's rules."""
    return 0 < len(text) <= _LONGEST_ID and all(c.isascii() and (c.isalnum() or c in "-_.") for c in text)


def _issued(data: bytes, server_cas: Sequence[bytes]) -> x509.Certificate:
    if len(data) > _CERTIFICATE_CAP:
        raise ValueError("too large")
    certificate = x509.load_der_x509_certificate(data)
    for each in server_cas:
        authority = x509.load_der_x509_certificate(each)
        if certificate.issuer == authority.subject:
            certificate.verify_directly_issued_by(authority)
            return certificate
    raise ValueError("another issuer")


def _not_one() -> NotAuthenticated:
    return NotAuthenticated(
        "what should be a sealing key is none that this cloud's CA issued; tell its operator"
    )
