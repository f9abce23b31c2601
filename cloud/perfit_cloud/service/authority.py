"""Who may call: invites, device identities, renewal and revocation.

A state folder (0700) holds

    server_ca.pem, device_ca.pem   keys and certificates of the two authorities, 0600
    authority.db                   SQLite: invites (hashed), identities with their dates, the cloud's id
    addresses.json                 where the running server is reached; `invite` reads it

`perfit-cloud invite` and `revoke` write the database while a server runs; the server reads it on every
call, so a revocation counts from the next call on. About a device nothing else is ever written.
"""

from __future__ import annotations

import datetime
import hashlib
import hmac
import os
import secrets
import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from perfit_cloud.service.certificates import (
    CertificateAuthority,
    fresh_identity,
    identity_of,
    private_pem,
    read_certificate,
    read_csr,
)
from perfit_cloud.service.drain import stopping
from perfit_shared.errors import (
    Busy,
    CertificateExpired,
    ConfigError,
    IdentityRevoked,
    InvalidInput,
    InviteRefused,
    NotAuthenticated,
    NotFound,
)

__all__ = ["Authority", "Device", "ServerIdentity"]

_SECRET_BYTES = 32
_CHALLENGE_SECONDS = 60
_RENEW_CONTEXT = b"perfit-renew-v1"  # what is signed for a renewal can be taken for nothing else
_SERVER_LIFE = datetime.timedelta(days=90)
_SHORTEST_PREFIX = 4  # characters of an identity that `revoke` takes
_LOCK_SECONDS = 10.0  # how long another process's write is waited for
_RETRY_MS = 1000
_FORMAT = "1"
_SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS invites (
    secret_hash BLOB PRIMARY KEY,  -- sha-256: whoever reads this file cannot enrol
    expires INTEGER NOT NULL,      -- unix seconds
    key_hash BLOB,                 -- sha-256 of the device's public key, once used
    certificate BLOB               -- DER, to answer a repeated request, since replies get lost
);
CREATE TABLE IF NOT EXISTS devices (
    identity TEXT PRIMARY KEY,
    issued INTEGER NOT NULL,       -- unix seconds: of the newest certificate
    expires INTEGER NOT NULL,
    revoked INTEGER                -- unix seconds, NULL while welcome
);
"""


@dataclass(frozen=True)
class Device:
    """What is known of a device: dates."""

    identity: str  # 32 hex digits, in its certificate
    issued: int  # unix seconds, of its newest certificate
    expires: int
    revoked: int | None


@dataclass(frozen=True)
class ServerIdentity:
    """The server's TLS key and certificate, in memory only."""

    key_pem: bytes
    certificate_pem: bytes
    renew_at: float  # unix seconds
    ends_at: float


class Authority:
    """Thread-safe; several processes may open one state folder."""

    def __init__(self, state: Path, *, certificate_seconds: int, lapse_seconds: int) -> None:
        """Open or make the state folder. Raises ConfigError when it is damaged or cannot be made."""
        self._life = datetime.timedelta(seconds=certificate_seconds)
        self._lapse = lapse_seconds
        try:
            state.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._server_ca = CertificateAuthority.open(state / "server_ca.pem", "perfit server CA")
            self._device_ca = CertificateAuthority.open(state / "device_ca.pem", "perfit device CA")
            self._db = _open_database(state / "authority.db")
        except (OSError, sqlite3.Error) as error:
            raise ConfigError(f"cannot use the state folder {state}: {error}") from error
        self._lock = threading.Lock()
        self._is_closed = False
        self._challenge_key = secrets.token_bytes(32)
        self._answered: dict[bytes, float] = {}  # nonces used, until they would lapse anyway
        self.cloud_id = self._meta("cloud_id", secrets.token_hex(16))
        if self._meta("format", _FORMAT) != _FORMAT:
            raise ConfigError(f"{state} was written by another version of perfit-cloud")

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

    def close(self) -> None:
        """A call that outlives it, when a server stops, is told so."""
        with self._lock:
            self._is_closed = True
            self._db.close()

    # -- the server's own certificate ------------------------------------------------------------

    def server_identity(self, names: Sequence[str]) -> ServerIdentity:
        """A fresh key and certificate for `names`; ask again at `renew_at`."""
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = self._server_ca.issue_server(key.public_key(), names, _SERVER_LIFE)
        pem = certificate.public_bytes(serialization.Encoding.PEM)
        life = _SERVER_LIFE.total_seconds()
        return ServerIdentity(private_pem(key), pem, time.time() + life / 2, time.time() + life)

    # -- invites and enrolment -------------------------------------------------------------------

    def invite(self, life_seconds: int) -> tuple[bytes, int]:
        """(secret, expiry in unix seconds) of a new one-time invite."""
        secret, now = secrets.token_bytes(_SECRET_BYTES), int(time.time())
        with self._transaction() as db:
            # What nobody can use any more is forgotten.
            over = now - self._lapse
            db.execute("DELETE FROM invites WHERE expires < ?", (over,))
            db.execute("DELETE FROM devices WHERE expires < ?", (over,))
            db.execute(
                "INSERT INTO invites (secret_hash, expires) VALUES (?, ?)",
                (_hash(secret), now + life_seconds),
            )
        return secret, now + life_seconds

    def enroll(self, secret: bytes, csr: bytes) -> bytes:
        """Certificate in DER for a new identity; the same one again for the same invite and key.

        Raises InviteRefused, IdentityRevoked or InvalidInput.
        """
        key = read_csr(csr)
        key_hash = _hash(_key_bytes(key))
        with self._transaction() as db:
            row = db.execute(
                "SELECT expires, key_hash, certificate FROM invites WHERE secret_hash = ?", (_hash(secret),)
            ).fetchone()
            if row is None:
                raise InviteRefused("this cloud does not know this invite; ask the operator for a new one")
            expires, used_by, known = row
            if used_by is not None:
                if not hmac.compare_digest(used_by, key_hash):
                    raise InviteRefused("another device used this invite; ask the operator for a new one")
                self._check_known(db, identity_of(read_certificate(known)))
                return bytes(known)
            if expires <= time.time():
                raise InviteRefused("this invite has expired; ask the operator for a new one")
            certificate = self._issue(db, key, fresh_identity())
            db.execute(
                "UPDATE invites SET key_hash = ?, certificate = ? WHERE secret_hash = ?",
                (key_hash, certificate, _hash(secret)),
            )
            return certificate

    # -- renewal ---------------------------------------------------------------------------------

    def renew(self, identity: str, csr: bytes) -> bytes:
        """A new certificate for a known identity. Raises IdentityRevoked, NotAuthenticated, InvalidInput."""
        key = read_csr(csr)
        with self._transaction() as db:
            self._check_known(db, identity)
            return self._issue(db, key, identity)

    def challenge(self) -> bytes:
        """A nonce, 32 bytes: the time, chance, and a tag over both.

        The tag makes it recognisable without being stored, so that asking for nonces fills no memory.
        """
        head = int(time.time()).to_bytes(8, "big") + secrets.token_bytes(8)
        return head + self._tag(head)

    def renew_lapsed(self, *, certificate: bytes, nonce: bytes, signature: bytes, csr: bytes) -> bytes:
        """A new certificate against an old one that lapsed, and proof of its key.

        Raises NotAuthenticated, CertificateExpired, IdentityRevoked or InvalidInput.
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
        self._spend(nonce)
        if time.time() > old.not_valid_after_utc.timestamp() + self._lapse:
            days = self._lapse // 86400
            raise CertificateExpired(
                f"the certificate lapsed more than {days} days ago; ask the operator for an invite"
            )
        return self.renew(identity_of(old), csr)

    def _tag(self, head: bytes) -> bytes:
        return hmac.digest(self._challenge_key, head, "sha256")[:16]

    def _spend(self, nonce: bytes) -> None:
        """Raises NotAuthenticated unless we made the nonce within 60 s and it is used for the first time."""
        head, now = nonce[:16], time.time()
        age = now - int.from_bytes(head[:8], "big")
        if not hmac.compare_digest(self._tag(head), nonce[16:]) or not -1 <= age <= _CHALLENGE_SECONDS:
            raise NotAuthenticated("the challenge has expired; try again")
        with self._lock:
            self._answered = {n: end for n, end in self._answered.items() if end > now}
            if nonce in self._answered:
                raise NotAuthenticated("the challenge was used already; try again")
            self._answered[nonce] = now + _CHALLENGE_SECONDS + 2

    # -- every call ------------------------------------------------------------------------------

    def check(self, certificate: x509.Certificate) -> str:
        """The identity of a caller whose certificate TLS accepted when the channel was opened.

        Raises CertificateExpired, IdentityRevoked or NotAuthenticated as things stand now, Unavailable
        when the authority was closed.
        """
        now = datetime.datetime.now(datetime.UTC)
        if now > certificate.not_valid_after_utc:
            raise CertificateExpired("this device's certificate has expired; it can be renewed")
        if now < certificate.not_valid_before_utc:
            raise NotAuthenticated("this device's certificate is not valid yet; are the clocks right?")
        identity = identity_of(certificate)
        with self._database() as db:
            self._check_known(db, identity)
        return identity

    def _check_known(self, db: sqlite3.Connection, identity: str) -> None:
        row = db.execute("SELECT revoked FROM devices WHERE identity = ?", (identity,)).fetchone()
        if row is None:
            raise NotAuthenticated("this cloud does not know this device; enrol with `perfit enroll`")
        if row[0] is not None:
            raise IdentityRevoked("the operator withdrew this device's identity; ask for a new invite")

    # -- the operator ----------------------------------------------------------------------------

    def revoke(self, prefix: str) -> str:
        """Withdraw the one identity that starts with `prefix`, and return it; again changes nothing.

        Raises InvalidInput when the prefix is short or fits several, NotFound when it fits none.
        """
        prefix = prefix.strip().lower()
        if len(prefix) < _SHORTEST_PREFIX:
            raise InvalidInput(f"give at least {_SHORTEST_PREFIX} characters of the identity")
        with self._transaction() as db:
            rows = db.execute(
                "SELECT identity FROM devices WHERE substr(identity, 1, ?) = ? LIMIT 2", (len(prefix), prefix)
            ).fetchall()
            if not rows:
                raise NotFound(f'no identity starts with "{prefix[:40]}"; see `perfit-cloud devices`')
            if len(rows) > 1:
                raise InvalidInput(f'several identities start with "{prefix[:40]}"; give more of it')
            identity = str(rows[0][0])
            db.execute(
                "UPDATE devices SET revoked = ? WHERE identity = ? AND revoked IS NULL",
                (int(time.time()), identity),
            )
        return identity

    def devices(self) -> list[Device]:
        """All identities, newest certificate first."""
        with self._database() as db:
            rows = db.execute(
                "SELECT identity, issued, expires, revoked FROM devices ORDER BY issued DESC, identity"
            ).fetchall()
        return [Device(*row) for row in rows]

    # -- inside ----------------------------------------------------------------------------------

    def _issue(self, db: sqlite3.Connection, key: ec.EllipticCurvePublicKey, identity: str) -> bytes:
        certificate = self._device_ca.issue_device(key, identity, self._life)
        db.execute(
            "INSERT INTO devices (identity, issued, expires) VALUES (?, ?, ?) "
            "ON CONFLICT (identity) DO UPDATE SET issued = excluded.issued, expires = excluded.expires",
            (identity, int(time.time()), int(certificate.not_valid_after_utc.timestamp())),
        )
        return certificate.public_bytes(serialization.Encoding.DER)

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """One writer at a time, in this process and in others; rolled back on any error.

        Raises Busy when another process does not let go of the database.
        """
        with self._database() as db:
            try:
                db.execute("BEGIN IMMEDIATE")
            except sqlite3.OperationalError as error:
                raise Busy("the cloud's list of devices is in use; try again", retry_ms=_RETRY_MS) from error
            try:
                yield db
            except BaseException:
                db.execute("ROLLBACK")
                raise
            db.execute("COMMIT")

    @contextmanager
    def _database(self) -> Iterator[sqlite3.Connection]:
        """For one thread at a time. Raises Unavailable when it was closed."""
        with self._lock:
            if self._is_closed:
                raise stopping()
            yield self._db

    def _meta(self, key: str, default: str) -> str:
        """The stored value of `key`; the first process to ask stores its default."""
        with self._transaction() as db:
            db.execute("INSERT OR IGNORE INTO meta VALUES (?, ?)", (key, default))
            row = db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        return str(row[0])


def _open_database(path: Path) -> sqlite3.Connection:
    # Made with 0600 before SQLite opens it; its journal files take over the same mode.
    os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
    # Every use is under a lock of ours; other processes are waited for.
    db = sqlite3.connect(path, timeout=_LOCK_SECONDS, isolation_level=None, check_same_thread=False)
    db.execute("PRAGMA journal_mode = WAL")
    db.execute("PRAGMA secure_delete = ON")
    db.executescript(_SCHEMA)
    return db


def _hash(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def _key_bytes(key: ec.EllipticCurvePublicKey) -> bytes:
    return key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
