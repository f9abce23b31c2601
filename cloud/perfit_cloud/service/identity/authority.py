"""Issues certificates: invites, enrolment, renewal, revocation.

A state folder (0700) holds

    server_ca.pem, device_ca.pem   keys and certificates of the two authorities, 0600
    authority.db                   invites (hashed) and identities with their dates (`store`)
    addresses.json                 where the running server is reached; `invite` reads it

`perfit-cloud invite` and `revoke` write the database while a server runs; the server sees it within a
second, and no call waits for the database (`identity_cache`).

A renewal retires the certificate it replaces. Every certificate carries its generation, one more than the
newest before it. Replies get lost, so an older one stays valid until a newer one was used.
"""

from __future__ import annotations

import datetime
import hashlib
import hmac
import secrets
import time
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from perfit_cloud.service.identity.authenticator import Authenticator, ServerIdentity, unknown_identity
from perfit_cloud.service.identity.certificates import (
    CertificateAuthority,
    fresh_identity,
    generation_of,
    identity_of,
    read_certificate,
    read_csr,
)
from perfit_cloud.service.identity.challenges import Challenges
from perfit_cloud.service.identity.sqlite_store import SQLiteStore
from perfit_cloud.service.identity.store import Device, Enrolment, InviteState
from perfit_cloud.service.state_folder import DATABASE, DEVICE_CA_CERTIFICATE, SERVER_IDENTITY, check_state
from perfit_shared.errors import (
    CertificateExpired,
    CertificateValid,
    ConfigError,
    InvalidInput,
    InviteRefused,
    NotAuthenticated,
    NotFound,
    StoreFailed,
)
from perfit_shared.files import write_whole
from perfit_shared.ownership import make_private_folder

__all__ = ["Authority"]

_SECRET_BYTES = 32
_RENEW_CONTEXT = b"perfit-renew-v1"  # so that what is signed for a renewal can be taken for nothing else
_SERVER_LIFE = datetime.timedelta(days=90)
_SHORTEST_PREFIX = 4  # characters of an identity that `revoke` takes


class Authority(Authenticator):
    """An authenticator that also holds the keys of both authorities."""

    def __init__(
        self, state: Path, *, certificate_seconds: int, lapse_seconds: int, trusts_group: bool = False
    ) -> None:
        """Open or make the state folder; `trusts_group`: its group may write it.

        Raises ConfigError when it is damaged, cannot be made or is writable by others; Busy.
        """
        self._life = datetime.timedelta(seconds=certificate_seconds)
        self._lapse = lapse_seconds
        try:
            make_private_folder(state)
            check_state(state, trusts_group=trusts_group)
            self._server_ca = CertificateAuthority.open(
                state / "server_ca.pem", "perfit server CA", trusts_group=trusts_group
            )
            self._device_ca = CertificateAuthority.open(
                state / "device_ca.pem", "perfit device CA", trusts_group=trusts_group
            )
            super().__init__(SQLiteStore(state / DATABASE), self._device_ca.certificate)
        except (OSError, StoreFailed) as error:
            raise ConfigError(f"cannot use the state folder {state}: {error}") from error
        self._challenges = Challenges(self._store)

    @property
    def server_ca_der(self) -> bytes:
        return self._server_ca.der

    def ends(self) -> dict[str, float]:
        return {"server_ca": self._server_ca.certificate.not_valid_after_utc.timestamp(), **super().ends()}

    # -- servers' certificates -------------------------------------------------------------------

    def server_identity(self, names: Sequence[str]) -> ServerIdentity:
        """A fresh key and certificate for `names`; ask again at `renew_at`."""
        key = ec.generate_private_key(ec.SECP256R1())
        return ServerIdentity.of(key, self._server_ca.issue_server(key.public_key(), names, _SERVER_LIFE))

    def write_serving_files(self, folder: Path, names: Sequence[str]) -> None:
        """Write the files that a serving process needs. Call again in time to renew its certificate."""
        identity = self.server_identity(names)
        write_whole(folder / DEVICE_CA_CERTIFICATE, self.device_ca_pem, mode=0o600)
        write_whole(folder / SERVER_IDENTITY, identity.key_pem + identity.certificate_pem, mode=0o600)

    # -- invites and enrolment -------------------------------------------------------------------

    def invite(self, life_seconds: int) -> tuple[bytes, int]:
        """(secret, expiry in unix seconds) of a new one-time invite."""
        secret, expires = secrets.token_bytes(_SECRET_BYTES), int(time.time()) + life_seconds
        self._store.add_invite(_hash(secret), expires)
        return secret, expires

    def enroll(self, secret: bytes, csr: bytes) -> bytes:
        """Certificate in DER for a new identity.

        The same invite and key get the same one again, until it was used. Raises InviteRefused,
        IdentityRevoked or InvalidInput.
        """
        key = read_csr(csr)
        secret_hash, key_hash = _hash(secret), _hash(_key_bytes(key))
        invite = self._store.invite(secret_hash)
        if invite is not None and not invite.is_used and time.time() < invite.expires:
            identity, issued = fresh_identity(), int(time.time())
            certificate = self._issue(key, identity, generation=1, issued=issued)
            enrolment = Enrolment(identity, key_hash, certificate)
            if self._store.enroll(secret_hash, enrolment, issued=issued, expires=self._end(issued)):
                self._identities.look()  # so that the device's first call finds it known
                return certificate
            invite = self._store.invite(secret_hash)  # another caller was faster
        return self._answer_again(invite, key_hash)

    def _answer_again(self, invite: InviteState | None, key_hash: bytes) -> bytes:
        """The certificate that the invite was spent on, for whoever has its key. Raises as `enroll` does."""
        if invite is None:
            raise InviteRefused("this cloud does not know this invite; ask the operator for a new one")
        if not invite.is_used:
            raise InviteRefused("this invite has expired; ask the operator for a new one")
        if invite.enrolment is None:
            raise InviteRefused("this invite was used already; ask the operator for a new one")
        if not hmac.compare_digest(invite.enrolment.key_hash, key_hash):
            raise InviteRefused("another device used this invite; ask the operator for a new one")
        self._state(invite.enrolment.identity)
        return invite.enrolment.certificate

    # -- renewal ---------------------------------------------------------------------------------

    def renew(self, certificate: x509.Certificate, csr: bytes) -> bytes:
        """The next certificate of an identity, in DER, against one that may call.

        Its first use retires the older ones. Raises as `check` does, and InvalidInput.
        """
        self.check(certificate)
        return self._renew(certificate, read_csr(csr))

    def challenge(self) -> bytes:
        """A nonce for `renew_lapsed`, good once and for a minute."""
        return self._challenges.make()

    def renew_lapsed(self, *, certificate: bytes, nonce: bytes, signature: bytes, csr: bytes) -> bytes:
        """The next certificate, against one whose time is over, and proof of its key.

        A certificate that is not valid yet is accepted, too: a fast clock may have made it, and no listener
        takes it. The nonce is spent last, so that only a successful renewal writes to the store. Raises
        NotAuthenticated, CertificateExpired, CertificateValid, CertificateSuperseded, IdentityRevoked or
        InvalidInput.
        """
        old = read_certificate(certificate)
        # Only if we issued it: the library raises on keys of unknown kinds.
        key = old.public_key() if self._device_ca.issued(old) else None
        if not isinstance(key, ec.EllipticCurvePublicKey):
            raise NotAuthenticated("this cloud did not issue that certificate; enrol with `perfit enroll`")
        try:
            key.verify(signature, _RENEW_CONTEXT + nonce + csr, ec.ECDSA(hashes.SHA256()))
        except InvalidSignature:
            raise NotAuthenticated("the renewal is not signed by the key of the old certificate") from None
        new_key, now = read_csr(csr), time.time()
        if now > old.not_valid_after_utc.timestamp() + self._lapse:
            days = self._lapse // 86400
            raise CertificateExpired(
                f"the certificate lapsed more than {days} days ago; ask the operator for an invite"
            )
        if old.not_valid_before_utc.timestamp() <= now <= old.not_valid_after_utc.timestamp():
            raise CertificateValid("this certificate has not lapsed; renew it with it, over mutual TLS")
        self._refuse_superseded(old)
        self._challenges.use(nonce)
        self._check_newest(old)  # behind the nonce, or a replay would retire certificates
        return self._renew(old, new_key)

    def _renew(self, old: x509.Certificate, key: ec.EllipticCurvePublicKey) -> bytes:
        identity, issued = identity_of(old), int(time.time())
        generation = self._store.renew(
            identity, generation=generation_of(old), issued=issued, expires=self._end(issued)
        )
        if generation is None:
            self._identities.look()  # it was revoked or deleted a moment ago
            self._state(identity)
            raise unknown_identity()
        return self._issue(key, identity, generation=generation, issued=issued)

    def _end(self, issued: int) -> int:
        return issued + int(self._life.total_seconds())

    def _issue(self, key: ec.EllipticCurvePublicKey, identity: str, *, generation: int, issued: int) -> bytes:
        certificate = self._device_ca.issue_device(
            key, identity, self._life, generation=generation, issued=issued
        )
        return certificate.public_bytes(serialization.Encoding.DER)

    # -- the operator ----------------------------------------------------------------------------

    def revoke(self, prefix: str) -> str:
        """Withdraw the one identity that starts with `prefix`, and return it. May be repeated.

        Raises InvalidInput when the prefix is short or fits several, NotFound when it fits none.
        """
        prefix = prefix.strip().lower()
        if len(prefix) < _SHORTEST_PREFIX:
            raise InvalidInput(f"give at least {_SHORTEST_PREFIX} characters of the identity")
        found = self._store.matching(prefix)
        if not found:
            raise NotFound(f'no identity starts with "{prefix[:40]}"; see `perfit-cloud devices`')
        if len(found) > 1:
            raise InvalidInput(f'several identities start with "{prefix[:40]}"; give more of it')
        self._store.revoke(found[0], int(time.time()))
        self._identities.look()
        return found[0]

    def devices(self) -> list[Device]:
        """All identities, newest certificate first. Raises Busy."""
        return self._store.devices()

    def prune(self, day: datetime.date) -> tuple[int, int]:
        """Delete the identities and invites that had ended by that day; returns how many of each.

        The operator names the day, so that a wrong clock deletes nothing. Raises InvalidInput when the day is
        in the future by this machine's clock.
        """
        start = datetime.datetime.combine(day, datetime.time(), datetime.UTC).timestamp()
        if start > time.time():
            raise InvalidInput(f"{day} is still to come by this machine's clock; give today or a day before")
        return self._store.prune(identities_before=int(start) - self._lapse, invites_before=int(start))


def _hash(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def _key_bytes(key: ec.EllipticCurvePublicKey) -> bytes:
    return key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
