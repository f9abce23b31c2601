"""Issues certificates: invites, enrolment, renewal, revocation.

A state folder (0700) holds

    server_ca.pem, device_ca.pem   keys and certificates of the two authorities, 0600 (`authorities`: and
                                   those before and after them, while they are replaced)
    authority.db                   invites (hashed) and identities with their dates (`store`), unless
                                   PostgreSQL has them
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
from collections.abc import Callable, Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from perfit_cloud.service.identity.authenticator import Authenticator, unknown_identity
from perfit_cloud.service.identity.authorities import AuthorityFiles
from perfit_cloud.service.identity.authority_keys import FILE_KEYS, AuthorityKeys
from perfit_cloud.service.identity.certificates import (
    check_lapse,
    check_proof,
    fresh_identity,
    generation_of,
    identity_of,
    key_hash,
    read_certificate,
    read_csr,
)
from perfit_cloud.service.identity.challenges import Challenges
from perfit_cloud.service.identity.opening import open_store
from perfit_cloud.service.identity.rotation import Rotation
from perfit_cloud.service.identity.server_authority import ServerAuthority
from perfit_cloud.service.identity.server_identity import ServerIdentity
from perfit_cloud.service.identity.store import Device, Enrolment, InviteState, OpenInvite
from perfit_cloud.service.state_folder import check_state
from perfit_shared.errors import (
    CertificateValid,
    ConfigError,
    InvalidInput,
    InviteRefused,
    NotAuthenticated,
    NotFound,
    StoreFailed,
)
from perfit_shared.ownership import make_private_folder
from perfit_shared.sealing.keys import PublicSealingKey

__all__ = ["Authority"]

_SECRET_BYTES = 32
_RENEW_CONTEXT = b"perfit-renew-v1"  # so that what is signed for a renewal can be taken for nothing else
_SHORTEST_PREFIX = 4  # characters of an identity that `revoke` takes
_LONGEST_LABEL = 100  # characters


class Authority(Authenticator):
    """An authenticator that also holds the keys of both authorities."""

    def __init__(
        self,
        state: Path,
        *,
        certificate_seconds: int,
        lapse_seconds: int,
        trusts_group: bool = False,
        database: str = "",
        refuse_after: float | None = None,
        keys: AuthorityKeys = FILE_KEYS,
    ) -> None:
        """Open or make the state folder; `trusts_group`: its group may write it.

        `database`: PostgreSQL that remembers in place of a file in the folder. `keys`: where the authorities'
        are kept.

        Raises ConfigError when it is damaged, cannot be made or is writable by others; Busy.
        """
        self._life = datetime.timedelta(seconds=certificate_seconds)
        self._lapse, self._state_folder = lapse_seconds, state
        try:
            make_private_folder(state)
            check_state(state, trusts_group=trusts_group)
            self._server_ca = AuthorityFiles(
                state, "server_ca", "perfit server CA", trusts_group=trusts_group, keys=keys
            )
            self._device_ca = AuthorityFiles(
                state, "device_ca", "perfit device CA", trusts_group=trusts_group, keys=keys
            )
            super().__init__(
                open_store(state, database),
                lambda: self._device_ca.get().certificates,
                refuse_after=refuse_after,
            )
        except (OSError, StoreFailed) as error:
            raise ConfigError(f"cannot use the state folder {state}: {error}") from error
        self._challenges = Challenges(self._store)
        self._renews_valid = bool(database)
        self.servers = ServerAuthority(
            self._server_ca,
            self._device_ca,
            self._store,
            self._challenges,
            lapse_seconds=lapse_seconds,
            check_identity=self._check_now,
        )

    @property
    def rotation(self) -> Rotation:
        """The steps by which both authorities are replaced."""
        authorities = (self._server_ca, self._device_ca)
        return Rotation(self._state_folder, authorities, self._store, lapse_seconds=self._lapse)

    @property
    def server_ca_der(self) -> bytes:
        return self._server_ca.get().current.der

    @property
    def other_server_ca_der(self) -> bytes:
        """The next root of servers, or the last; b"" where there is but one."""
        others = self._server_ca.get().certificates[1:]
        return others[0].public_bytes(serialization.Encoding.DER) if others else b""

    def ends(self) -> dict[str, float]:
        end = self._server_ca.get().current.certificate.not_valid_after_utc.timestamp()
        return {"server_ca": end, **super().ends()}

    # -- servers' certificates -------------------------------------------------------------------

    def server_identity(self, names: Sequence[str]) -> ServerIdentity:
        """A fresh key and certificate for `names`; ask again at `renew_at`."""
        return self.servers.identity(names)

    def certify_sealing_key(self, key: PublicSealingKey, key_id: str, life_seconds: int) -> bytes:
        """The server CA's certificate, DER, for a key that calls may be sealed to."""
        return self.servers.certify_sealing_key(key, key_id, life_seconds)

    def write_serving_files(self, folder: Path, names: Sequence[str]) -> str:
        """Write the files that a server without the role enrolment begins with; returns its identity."""
        return self.servers.write_files(folder, names)

    def _check_now(self, identity: str) -> None:
        """That it may call, by what the store says now. Raises as `_state` and `refresh` do."""
        self.refresh()
        self._state(identity)

    # -- invites and enrolment -------------------------------------------------------------------

    def invite(self, life_seconds: int, label: str = "") -> tuple[bytes, int]:
        """(secret, expiry in unix seconds) of a new one-time invite; the device gets its label.

        Raises InvalidInput on a label that does not fit a line.
        """
        _check_label(label)
        secret, expires = secrets.token_bytes(_SECRET_BYTES), int(time.time()) + life_seconds
        self._store.add_invite(_hash(secret), expires, label)
        return secret, expires

    def enroll(self, secret: bytes, csr: bytes) -> bytes:
        """Certificate in DER for a new identity.

        The same invite and key get the same one again, until it was used. Raises InviteRefused,
        IdentityRevoked or InvalidInput.
        """
        key = read_csr(csr)
        secret_hash, hash_of_key = _hash(secret), key_hash(key)
        invite = self._store.invite(secret_hash)
        if invite is not None and not invite.is_used and time.time() < invite.expires:
            identity, issued = fresh_identity(), int(time.time())
            certificate = self._issue(key, identity, generation=1, issued=issued)
            enrolment = Enrolment(identity, hash_of_key, certificate)
            if self._store.enroll(secret_hash, enrolment, issued=issued, expires=self._end(issued)):
                self._identities.look()  # so that the device's first call finds it known
                return certificate
            invite = self._store.invite(secret_hash)  # another caller was faster
        return self._answer_again(invite, hash_of_key)

    def _answer_again(self, invite: InviteState | None, hash_of_key: bytes) -> bytes:
        """The certificate that the invite was spent on, for whoever has its key. Raises as `enroll` does."""
        if invite is None:
            raise InviteRefused("this cloud does not know this invite; ask the operator for a new one")
        if not invite.is_used:
            raise InviteRefused("this invite has expired; ask the operator for a new one")
        if invite.enrolment is None:
            raise InviteRefused("this invite was used already; ask the operator for a new one")
        if not hmac.compare_digest(invite.enrolment.key_hash, hash_of_key):
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

    def renew_lapsed(
        self, *, certificate: bytes, nonce: bytes, signature: bytes, csr: bytes, is_not_here: bool = False
    ) -> bytes:
        """The next certificate, against one whose time is over, and proof of its key.

        `is_not_here`: the server that the device asked issues none, so one that holds is renewed, too, where
        several share a database.
        A certificate that is not valid yet is accepted, too: a fast clock may have made it, and no listener
        takes it. The nonce is spent last, so that only a successful renewal writes to the store. Raises
        NotAuthenticated, CertificateExpired, CertificateValid, CertificateSuperseded, IdentityRevoked or
        InvalidInput.
        """
        old = read_certificate(certificate)
        # Only if we issued it: the library raises on keys of unknown kinds.
        if not self._device_ca.get().issued(old):
            raise NotAuthenticated("this cloud did not issue that certificate; enrol with `perfit enroll`")
        check_proof(old, _RENEW_CONTEXT + nonce + csr, signature)
        new_key, now = read_csr(csr), time.time()
        check_lapse(old, self._lapse)
        is_valid = old.not_valid_before_utc.timestamp() <= now <= old.not_valid_after_utc.timestamp()
        if is_valid and not (is_not_here and self._renews_valid):
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
        certificate = self._device_ca.get().current.issue_device(
            key, identity, self._life, generation=generation, issued=issued
        )
        return certificate.public_bytes(serialization.Encoding.DER)

    # -- the operator ----------------------------------------------------------------------------

    def revoke(self, prefix: str) -> str:
        """Withdraw the one identity that starts with `prefix`, and return it. May be repeated.

        Raises InvalidInput when the prefix is short or fits several, NotFound when it fits none.
        """
        identity = self._identity(prefix)
        self._store.revoke(identity, int(time.time()))
        self._identities.look()
        return identity

    def restore(self, prefix: str) -> str:
        """Welcome an identity again that was withdrawn, as `revoke` finds it."""
        identity = self._identity(prefix)
        self._store.restore(identity)
        self._identities.look()
        return identity

    def set_label(self, prefix: str, label: str) -> str:
        """Put the operator's own words to an identity, as `revoke` finds it; "" takes them away."""
        _check_label(label)
        identity = self._identity(prefix)
        self._store.set_label(identity, label)
        return identity

    def _identity(self, prefix: str) -> str:
        return _only(prefix, "identity", self._store.matching, "devices")

    def open_invites(self) -> list[OpenInvite]:
        """Those that can still be used, the first to end first."""
        return [invite for invite in self._store.open_invites() if invite.expires > time.time()]

    def revoke_invite(self, prefix: str) -> str:
        """Forget the one open invite whose id starts with `prefix`, and return its id. Raises as `revoke`."""
        ids = {invite.secret_hash.hex(): invite for invite in self._store.open_invites()}
        found = _only(prefix, "open invite", lambda p: [i for i in ids if i.startswith(p)], "invites")
        if not self._store.delete_invite(ids[found].secret_hash):
            raise NotFound("a device used this invite just now; see `perfit-cloud devices`")
        return found

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


def _only(prefix: str, what: str, matching: Callable[[str], list[str]], command: str) -> str:
    """The one that starts with `prefix`. Raises InvalidInput, NotFound."""
    prefix = prefix.strip().lower()
    if len(prefix) < _SHORTEST_PREFIX:
        raise InvalidInput(f"give at least {_SHORTEST_PREFIX} characters of the {what}")
    found = matching(prefix)
    if not found:
        raise NotFound(f'no {what} starts with "{prefix[:40]}"; see `perfit-cloud {command}`')
    if len(found) > 1:
        raise InvalidInput(f'more than one {what} starts with "{prefix[:40]}"; give more of it')
    return found[0]


def _check_label(label: str) -> None:
    if len(label) > _LONGEST_LABEL or not (label.isprintable() or not label):
        raise InvalidInput(f"a label should be one line of at most {_LONGEST_LABEL} characters")


def _hash(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()
