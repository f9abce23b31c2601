"""Who may call. A process that serves needs no key of an authority.

It needs the database and the files of `server_files`, which `Authority.write_serving_files` makes.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import serialization

from perfit_cloud.service.identity.certificates import generation_of, identity_of
from perfit_cloud.service.identity.identity_cache import IdentityCache
from perfit_cloud.service.identity.opening import open_store
from perfit_cloud.service.identity.server_files import ServerFiles
from perfit_cloud.service.identity.store import IdentityState, IdentityStore
from perfit_cloud.service.state_folder import check_state
from perfit_shared.errors import (
    CertificateExpired,
    CertificateSuperseded,
    ConfigError,
    IdentityRevoked,
    NotAuthenticated,
    StoreFailed,
)

__all__ = ["Authenticator", "unknown_identity"]


class Authenticator:
    """Thread-safe; several processes may share one store."""

    def __init__(
        self,
        store: IdentityStore,
        device_cas: Callable[[], tuple[x509.Certificate, ...]],
        *,
        refuse_after: float | None = None,
    ) -> None:
        """`device_cas`: the roots of devices' certificates, as they are now, the one that signs first.

        `refuse_after`: as the identity cache takes it. Raises Busy, StoreFailed, the store closed.
        """
        self._store = store
        self._device_cas = device_cas
        try:
            self._identities = IdentityCache(store, refuse_after=refuse_after)
            self.cloud_id = store.setting("cloud_id", secrets.token_hex(16))
        except BaseException:
            store.close()
            raise

    @classmethod
    def open(
        cls, state: Path, *, trusts_group: bool = False, database: str = "", refuse_after: float | None = None
    ) -> Authenticator:
        """Open a state folder that an `Authority` made. `trusts_group`: its group may write it.

        `database`: PostgreSQL, where that remembers, and not a file in the folder. Raises ConfigError when a
        file is missing, damaged or writable by others; Busy.
        """
        check_state(state, trusts_group=trusts_group)
        files = ServerFiles(state, trusts_group=trusts_group)
        files.device_cas()
        try:
            return Authenticator(open_store(state, database), files.device_cas, refuse_after=refuse_after)
        except (OSError, StoreFailed) as error:
            raise ConfigError(f"cannot use the state folder {state}: {error}") from error

    @property
    def device_ca_pem(self) -> bytes:
        """All roots of devices' certificates that hold now."""
        return b"".join(ca.public_bytes(serialization.Encoding.PEM) for ca in self._device_cas())

    def ends(self) -> dict[str, float]:
        """When the authorities' certificates end, unix seconds; `perfit-cloud rotate` replaces them."""
        return {"device_ca": self._device_cas()[0].not_valid_after_utc.timestamp()}

    @property
    def identities_age_seconds(self) -> float:
        """Since the last look at what other processes wrote to the store."""
        return self._identities.age_seconds

    @property
    def is_deaf(self) -> bool:
        """Whether calls are refused because the store was not looked at for too long."""
        return self._identities.is_deaf

    def watched(self, identity: str, end: Callable[[], object]) -> AbstractContextManager[None]:
        """Call `end`, which must not wait, should the identity be withdrawn while the block runs."""
        return self._identities.watched(identity, end)

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

    def leave(self, certificate: x509.Certificate) -> None:
        """Withdraw the identity of a device that asks for it. Raises as `check` does."""
        self._store.revoke(self.check(certificate), int(time.time()))
        self._identities.look()

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
            raise IdentityRevoked("this device's identity was withdrawn; ask the operator for a new invite")
        return state


def unknown_identity() -> NotAuthenticated:
    return NotAuthenticated("this cloud does not know this device; enrol with `perfit enroll`")
