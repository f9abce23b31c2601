"""A server's own key and certificate."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from perfit_cloud.service.identity.authority_keys import private_pem
from perfit_cloud.service.identity.certificates import read_pair
from perfit_shared.errors import ConfigError

__all__ = ["ServerIdentity"]


@dataclass(frozen=True)
class ServerIdentity:
    """The server's TLS key and certificate."""

    key: ec.EllipticCurvePrivateKey = field(repr=False)
    certificate: x509.Certificate
    key_pem: bytes = field(repr=False)
    certificate_pem: bytes
    starts_at: float  # unix seconds
    renew_at: float  # when half of its life is over
    ends_at: float

    @classmethod
    def of(cls, key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate) -> Self:
        starts_at = certificate.not_valid_before_utc.timestamp()
        ends_at = certificate.not_valid_after_utc.timestamp()
        return cls(
            key=key,
            certificate=certificate,
            key_pem=private_pem(key),
            certificate_pem=certificate.public_bytes(serialization.Encoding.PEM),
            starts_at=starts_at,
            renew_at=(starts_at + ends_at) / 2,
            ends_at=ends_at,
        )

    @classmethod
    def load(cls, path: Path, *, trusts_group: bool = False) -> Self:
        """Raises ConfigError when the file is missing, damaged, or readable by others."""
        try:
            return cls.of(*read_pair(path, trusts_group=trusts_group))
        except OSError as error:
            raise ConfigError(f"cannot read the server's certificate {path}: {error.strerror}") from error
