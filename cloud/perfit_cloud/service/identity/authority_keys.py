"""Where the keys of authorities are kept: the interface, and the files that are the default.

An authority's file holds its certificate, and before it what leads to its key: the key itself, or the label
of one that never leaves a token (`token_keys`).
"""

from __future__ import annotations

from typing import Protocol

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from perfit_shared.errors import ConfigError

__all__ = ["FILE_KEYS", "AuthorityKeys", "FileKeys", "private_pem"]


class AuthorityKeys(Protocol):
    """Thread-safe, and so are the keys, which may be used only to sign."""

    def create(self) -> tuple[ec.EllipticCurvePrivateKey, bytes]:
        """A new P-256 key, and what the authority's file keeps of it. Raises ConfigError, Busy."""

    def load(self, data: bytes) -> ec.EllipticCurvePrivateKey:
        """The key that such a file leads to. Raises ValueError on what is none, ConfigError, Busy."""

    def delete(self, data: bytes) -> None:
        """Delete the key that such a file led to, where it lies elsewhere. Raises as `load`."""


class FileKeys:
    """PKCS#8 in the file itself."""

    def create(self) -> tuple[ec.EllipticCurvePrivateKey, bytes]:
        key = ec.generate_private_key(ec.SECP256R1())
        return key, private_pem(key)

    def load(self, data: bytes) -> ec.EllipticCurvePrivateKey:
        if b"perfit-token-key:" in data:
            raise ConfigError("the authorities' keys lie in a token; set ca_token to it")
        try:
            key = serialization.load_pem_private_key(data, password=None)
        except (TypeError, UnsupportedAlgorithm) as error:
            raise ValueError("no key") from error
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise ValueError("a key of another kind")
        return key

    def delete(self, data: bytes) -> None:
        """It went with the file."""


FILE_KEYS = FileKeys()


def private_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
