"""Who may call: invites, device identities, renewal and revocation.

A state folder (0700) holds

    server_ca.pem, device_ca.pem   keys and certificates of the two authorities, 0600
    authority.db                   SQLite: invites (hashed), identities with their dates (`store`)
    addresses.json                 where the running server is reached; `invite` reads it

`perfit-cloud invite` and `revoke` write the database while a server runs; the server sees it within a
second, and no call waits for the database (`identity_cache`).

A renewal retires what it replaces. Every certificate carries its generation, one more than the newest
before it; replies get lost, so an older one holds until a newer one was used, and then never again.
"""

from __future__ import annotations

import datetime
import hashlib
import hmac
import secrets
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from perfit_cloud.service.identity.certificates import (
    CertificateAuthority,
    fresh_identity,
    generation_of,
    identity_of,
    private_pem,
    read_certificate,
    read_csr,
)
from perfit_cloud.service.identity.challenges import Challenges
from perfit_cloud.service.identity.identity_cache import IdentityCache
from perfit_cloud.service.identity.store import UNUSED, Device, IdentityState, IdentityStore
from perfit_cloud.service.state_folder import check_state
from perfit_shared.errors import (
    CertificateExpired,
    CertificateSuperseded,
    CertificateValid,
    ConfigError,
    IdentityRevoked,
    InvalidInput,
    InviteRefused,
    NotAuthenticated,
    NotFound,
)
from perfit_shared.ownership import make_private_folder

__all__ = ["Authority", "ServerIdentity"]

_SECRET_BYTES = 32
_RENEW_CONTEXT = b"perfit-renew-v1"  # what is signed for a renewal can be taken for nothing else
_SERVER_LIFE = datetime.timedelta(days=90)
_SHORTEST_PREFIX = 4  # characters of an identity that `revoke` takes


@dataclass(frozen=True)
class ServerIdentity:
    """The server's TLS key and certificate, in memory only."""

    key_pem: bytes
    certificate_pem: bytes
    starts_at: float  # unix seconds
    renew_at: float
    ends_at: float


@dataclass(frozen=True)
class _Change:
    """A transaction, and what is to be known of identities once it is committed."""

    db: sqlite3.Connection
    states: dict[str, IdentityState] = field(default_factory=dict)


class Authority:
    """Thread-safe; several processes may open one state folder."""

    def __init__(
        self, state: Path, *, certificate_seconds: int, lapse_seconds: int, trusts_group: bool = False
    ) -> None:
        """Open or make the state folder; `trusts_group`: its group may write it.

        Raises ConfigError when it is damaged, cannot be made, or is others' to write; Busy.
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
            self._store = IdentityStore(state / "authority.db")
            self._identities = IdentityCache(self._store)
            self.cloud_id = self._store.meta("cloud_id", secrets.token_hex(16))
        except (OSError, sqlite3.Error) as error:
            raise ConfigError(f"cannot use the state folder {state}: {error}") from error
        self._challenges = Challenges()

    @property
    def server_ca_der(self) -> bytes:
        return self._server_ca.der

    @property
    def device_ca_pem(self) -> bytes:
        return self._device_ca.pem

    def ends(self) -> dict[str, float]:
        """When the certificates of both authorities end, unix seconds; nothing renews them."""
        cas = {"server_ca": self._server_ca, "device_ca": self._device_ca}
        return {name: ca.certificate.not_valid_after_utc.timestamp() for name, ca in cas.items()}

    @property
    def identities_age_seconds(self) -> float:
        """Since the database was last looked at for what other processes wrote."""
        return self._identities.age_seconds

    def start(self) -> None:
        """Look at the database twice a second from now on, until `close`."""
        self._identities.start()

    def refresh(self) -> None:
        """Look at the database now. Raises Busy."""
        self._identities.refresh()

    def close(self) -> None:
        """A call that outlives it, when a server stops, is told so."""
        self._identities.stop()
        self._store.close()

    # -- the server's own certificate ------------------------------------------------------------

    def server_identity(self, names: Sequence[str]) -> ServerIdentity:
        """A fresh key and certificate for `names`; ask again at `renew_at`."""
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = self._server_ca.issue_server(key.public_key(), names, _SERVER_LIFE)
        pem = certificate.public_bytes(serialization.Encoding.PEM)
        ends_at = certificate.not_valid_after_utc.timestamp()
        return ServerIdentity(
            key_pem=private_pem(key),
            certificate_pem=pem,
            starts_at=certificate.not_valid_before_utc.timestamp(),
            renew_at=ends_at - _SERVER_LIFE.total_seconds() / 2,
            ends_at=ends_at,
        )

    # -- invites and enrolment -------------------------------------------------------------------

    def invite(self, life_seconds: int) -> tuple[bytes, int]:
        """(secret, expiry in unix seconds) of a new one-time invite."""
        secret, expires = secrets.token_bytes(_SECRET_BYTES), int(time.time()) + life_seconds
        with self._store.transaction() as db:
            db.execute("INSERT INTO invites (secret_hash, expires) VALUES (?, ?)", (_hash(secret), expires))
        return secret, expires

    def enroll(self, secret: bytes, csr: bytes) -> bytes:
        """Certificate in DER for a new identity; the same one again for the same invite and key.

        The latter until the certificate was used. Raises InviteRefused, IdentityRevoked or InvalidInput.
        """
        key = read_csr(csr)
        secret_hash, key_hash = _hash(secret), _hash(_key_bytes(key))
        with self._change() as change:
            db = change.db
            row = db.execute(
                "SELECT expires, used FROM invites WHERE secret_hash = ?", (secret_hash,)
            ).fetchone()
            if row is None:
                raise InviteRefused("this cloud does not know this invite; ask the operator for a new one")
            expires, is_used = row
            answer = db.execute(
                "SELECT identity, key_hash, certificate FROM enrolments WHERE secret_hash = ?", (secret_hash,)
            ).fetchone()
            if answer is not None:
                identity, used_by, known = answer
                if not hmac.compare_digest(used_by, key_hash):
                    raise InviteRefused("another device used this invite; ask the operator for a new one")
                self._row(db, identity)
                return bytes(known)
            if is_used:
                raise InviteRefused("this invite was used already; ask the operator for a new one")
            if expires <= time.time():
                raise InviteRefused("this invite has expired; ask the operator for a new one")
            identity = fresh_identity()
            certificate = self._issue(db, key, identity, 1)
            db.execute("UPDATE invites SET used = 1 WHERE secret_hash = ?", (secret_hash,))
            db.execute(
                "INSERT INTO enrolments VALUES (?, ?, ?, ?)", (identity, secret_hash, key_hash, certificate)
            )
            change.states[identity] = IdentityState(UNUSED)
            return certificate

    # -- renewal ---------------------------------------------------------------------------------

    def renew(self, certificate: x509.Certificate, csr: bytes) -> bytes:
        """The next certificate of an identity, in DER, against one that may call.

        It retires what came before when it is used for the first time. Raises as `check` does, and
        InvalidInput.
        """
        self.check(certificate)
        return self._renew(certificate, csr)

    def challenge(self) -> bytes:
        """A nonce for `renew_lapsed`, good once and for a minute."""
        return self._challenges.make()

    def renew_lapsed(self, *, certificate: bytes, nonce: bytes, signature: bytes, csr: bytes) -> bytes:
        """The next certificate, against one whose time is over, and proof of its key.

        Also against one whose time has not come, as a clock that was ahead may have made it: no listener
        takes it. Raises NotAuthenticated, CertificateExpired, CertificateValid, CertificateSuperseded,
        IdentityRevoked or InvalidInput.
        """
        old = read_certificate(certificate)
        # Not asked before we know it for ours: a key of a strange kind is an error of the library's.
        key = old.public_key() if self._device_ca.issued(old) else None
        if not isinstance(key, ec.EllipticCurvePublicKey):
            raise NotAuthenticated("this cloud did not issue that certificate; enrol with `perfit enroll`")
        try:
            key.verify(signature, _RENEW_CONTEXT + nonce + csr, ec.ECDSA(hashes.SHA256()))
        except InvalidSignature:
            raise NotAuthenticated("the renewal is not signed by the key of the old certificate") from None
        self._challenges.spend(nonce)
        now = time.time()
        if now > old.not_valid_after_utc.timestamp() + self._lapse:
            days = self._lapse // 86400
            raise CertificateExpired(
                f"the certificate lapsed more than {days} days ago; ask the operator for an invite"
            )
        if old.not_valid_before_utc.timestamp() <= now <= old.not_valid_after_utc.timestamp():
            raise CertificateValid("this certificate has not lapsed; renew it with it, over mutual TLS")
        self._check_newest(old)
        return self._renew(old, csr)

    def _renew(self, old: x509.Certificate, csr: bytes) -> bytes:
        key, identity = read_csr(csr), identity_of(old)
        with self._change() as change:
            newest = self._row(change.db, identity)
            # More than the row says only where an old copy of the database was put back.
            return self._issue(change.db, key, identity, max(newest, generation_of(old)) + 1)

    # -- every call ------------------------------------------------------------------------------

    def check(self, certificate: x509.Certificate) -> str:
        """The identity of a caller whose certificate TLS accepted when the channel was opened.

        As things stand now; nothing is waited for. Raises CertificateExpired, CertificateSuperseded,
        IdentityRevoked or NotAuthenticated, Unavailable when the authority was closed.
        """
        identity = self.recheck(certificate)
        self._check_newest(certificate)
        return identity

    def recheck(self, certificate: x509.Certificate) -> str:
        """The same for a call that is open: a newer certificate lets it end in its own time."""
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
        identity, generation = identity_of(certificate), generation_of(certificate)
        if generation < self._state(identity).used:
            self._identities.mark_superseded(identity)
            raise CertificateSuperseded(
                "a newer certificate of this device is in use, so this one is retired; if no other process "
                "of yours renewed it, somebody else holds its key: have it revoked, and enrol anew"
            )
        self._identities.mark_used(identity, generation)

    def _state(self, identity: str) -> IdentityState:
        state = self._identities.get(identity)
        if state is None:
            raise _unknown()
        if state.is_revoked:
            raise _revoked()
        return state

    # -- the operator ----------------------------------------------------------------------------

    def revoke(self, prefix: str) -> str:
        """Withdraw the one identity that starts with `prefix`, and return it; again changes nothing.

        Raises InvalidInput when the prefix is short or fits several, NotFound when it fits none.
        """
        prefix = prefix.strip().lower()
        if len(prefix) < _SHORTEST_PREFIX:
            raise InvalidInput(f"give at least {_SHORTEST_PREFIX} characters of the identity")
        with self._change() as change:
            db = change.db
            rows = db.execute(
                "SELECT identity, used, superseded FROM devices WHERE substr(identity, 1, ?) = ? LIMIT 2",
                (len(prefix), prefix),
            ).fetchall()
            if not rows:
                raise NotFound(f'no identity starts with "{prefix[:40]}"; see `perfit-cloud devices`')
            if len(rows) > 1:
                raise InvalidInput(f'several identities start with "{prefix[:40]}"; give more of it')
            identity, used, superseded = rows[0]
            db.execute(
                "UPDATE devices SET revoked = ? WHERE identity = ? AND revoked IS NULL",
                (int(time.time()), identity),
            )
            change.states[identity] = IdentityState(used, is_revoked=True, superseded=superseded)
        return str(identity)

    def devices(self) -> list[Device]:
        """All identities, newest certificate first. Raises Busy."""
        return self._store.devices()

    def prune(self, day: datetime.date) -> tuple[int, int]:
        """Delete the identities and invites that nobody could use any more on that day: how many of each.

        The day is the operator's word: a wrong clock of this machine deletes nothing. Raises InvalidInput
        when the day is still to come by that clock.
        """
        start = datetime.datetime.combine(day, datetime.time(), datetime.UTC).timestamp()
        if start > time.time():
            raise InvalidInput(f"{day} is still to come by this machine's clock; give today or a day before")
        return self._store.prune(identities_before=int(start) - self._lapse, invites_before=int(start))

    # -- inside ----------------------------------------------------------------------------------

    def _issue(
        self, db: sqlite3.Connection, key: ec.EllipticCurvePublicKey, identity: str, generation: int
    ) -> bytes:
        certificate = self._device_ca.issue_device(key, identity, self._life, generation=generation)
        db.execute(
            "INSERT INTO devices VALUES (?, ?, ?, ?, ?, NULL, NULL) ON CONFLICT (identity) DO UPDATE SET "
            "issued = excluded.issued, expires = excluded.expires, generation = excluded.generation",
            (
                identity,
                int(time.time()),
                int(certificate.not_valid_after_utc.timestamp()),
                generation,
                UNUSED,
            ),
        )
        return certificate.public_bytes(serialization.Encoding.DER)

    @staticmethod
    def _row(db: sqlite3.Connection, identity: str) -> int:
        """The newest generation of an identity that may have certificates.

        Raises NotAuthenticated or IdentityRevoked.
        """
        row = db.execute("SELECT generation, revoked FROM devices WHERE identity = ?", (identity,)).fetchone()
        if row is None:
            raise _unknown()
        if row[1] is not None:
            raise _revoked()
        return int(row[0])

    @contextmanager
    def _change(self) -> Iterator[_Change]:
        """A transaction, after which memory knows what was written. Raises Busy, Unavailable once closed."""
        with self._store.held():  # so that no refresh comes between the file and memory
            with self._store.transaction() as db:
                change = _Change(db)
                yield change
            self._identities.put(change.states)


def _unknown() -> NotAuthenticated:
    return NotAuthenticated("this cloud does not know this device; enrol with `perfit enroll`")


def _revoked() -> IdentityRevoked:
    return IdentityRevoked("the operator withdrew this device's identity; ask for a new invite")


def _hash(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def _key_bytes(key: ec.EllipticCurvePublicKey) -> bytes:
    return key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
