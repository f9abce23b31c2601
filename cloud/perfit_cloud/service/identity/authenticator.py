"""Who may call. A process that serves needs no key of an authority.

It needs the state folder's database and two files, which `Authority.write_serving_files` makes:

    device_ca.crt   the certificate that devices' certificates are checked against
    server.pem      the server's own key and certificate, 0600
"""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from perfit_cloud.service.identity.certificates import generation_of, identity_of, private_pem, read_pair
from perfit_cloud.service.identity.identity_cache import IdentityCache
from perfit_cloud.service.identity.sqlite_store import SQLiteStore
from perfit_cloud.service.identity.store import IdentityState, IdentityStore
from perfit_cloud.service.state_folder import DATABASE, DEVICE_CA_CERTIFICATE, check_state
from perfit_shared.errors import (
    CertificateExpired,
    CertificateSuperseded,
    ConfigError,
    IdentityRevoked,
    NotAuthenticated,
    StoreFailed,
)

__all__ = ["Authenticator", "ServerIdentity", "unknown_identity"]


@dataclass(frozen=True)
class ServerIdentity:
    """The server's TLS key and certificate."""

    key_pem: bytes
    certificate_pem: bytes
    starts_at: float  # unix seconds
    renew_at: float  # when half of its life is over
    ends_at: float

    @classmethod
    def of(cls, key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate) -> Self:
        starts_at = certificate.not_valid_before_utc.timestamp()
        ends_at = certificate.not_valid_after_utc.timestamp()
        return cls(
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


class Authenticator:
    """Thread-safe; several processes may share one store."""

    def __init__(self, store: IdentityStore, device_ca: x509.Certificate) -> None:
        """Raises Busy, StoreFailed."""
        self._store = store
        self._device_ca_certificate = device_ca
        self._identities = IdentityCache(store)
        self.cloud_id = store.setting("cloud_id", secrets.token_hex(16))

    @classmethod
    def open(cls, state: Path, *, trusts_group: bool = False) -> Authenticator:
        """Open a state folder that an `Authority` made. `trusts_group`: its group may write it.

        Raises ConfigError when a file is missing, damaged or writable by others; Busy.
        """
        check_state(state, trusts_group=trusts_group)
        try:
            device_ca = x509.load_pem_x509_certificate((state / DEVICE_CA_CERTIFICATE).read_bytes())
            return Authenticator(SQLiteStore(state / DATABASE), device_ca)
        except (OSError, ValueError, StoreFailed) as error:
            raise ConfigError(f"cannot use the state folder {state}: {error}") from error

    @property
    def device_ca_pem(self) -> bytes:
        return self._device_ca_certificate.public_bytes(serialization.Encoding.PEM)

    def ends(self) -> dict[str, float]:
        """When the authorities' certificates end, unix seconds. Nothing renews them."""
        return {"device_ca": self._device_ca_certificate.not_valid_after_utc.timestamp()}

    @property
    def identities_age_seconds(self) -> float:
        """Since the last look at what other processes wrote to the store."""
        return self._identities.age_seconds

    def start(self) -> None:
        """Look at the store twice a second from now on, until `close`."""
        self._identities.start()

    def refresh(self) -> None:
        """Look at the store now. Raises Busy, StoreFailed."""
        self._identities.refresh()

    def close(self) -> None:
        """Close the store. Calls that are still open get Unavailable."""
        self._identities.stop()
        self._store.close()

    # -- every call ------------------------------------------------------------------------------

    def check(self, certificate: x509.Certificate) -> str:
        """The identity of a caller whose certificate TLS accepted when the channel was opened.

        Answers from memory, without waiting. Raises CertificateExpired, CertificateSuperseded,
        IdentityRevoked or NotAuthenticated, Unavailable once closed.
        """
        identity = self.recheck(certificate)
        self._check_newest(certificate)
        return identity

    def recheck(self, certificate: x509.Certificate) -> str:
        """The same for a call that is open: a newer certificate does not end it."""
        now = time.time()
        if now > certificate.not_valid_after_utc.timestamp():
            raise CertificateExpired("this device's certificate has expired; it can be renewed")
        if now < certificate.not_valid_before_utc.timestamp():
            raise NotAuthenticated("this device's certificate is not valid yet; are the clocks right?")
        identity = identity_of(certificate)
        self._state(identity)
        return identity

    def _check_newest(self, certificate: x509.Certificate) -> None:
        """Retire what is older than this certificate, or find it retired itself."""
        self._refuse_superseded(certificate)
        self._identities.mark_used(identity_of(certificate), generation_of(certificate))

    def _refuse_superseded(self, certificate: x509.Certificate) -> None:
        """Raises CertificateSuperseded when a newer certificate of the device was used."""
        identity = identity_of(certificate)
        if generation_of(certificate) < self._state(identity).used:
            self._identities.mark_superseded(identity)
            raise CertificateSuperseded(
                "a newer certificate of this device is in use, so this one is retired; if no other process "
                "of yours renewed it, somebody else holds its key: have it revoked, and enrol anew"
            )

    def _state(self, identity: str) -> IdentityState:
        """The state of an identity that may call. Raises NotAuthenticated, IdentityRevoked."""
        state = self._identities.get(identity)
        if state is None:
            raise unknown_identity()
        if state.is_revoked:
            raise IdentityRevoked("the operator withdrew this device's identity; ask for a new invite")
        return state


def unknown_identity() -> NotAuthenticated:
    return NotAuthenticated("this cloud does not know this device; enrol with `perfit enroll`")
