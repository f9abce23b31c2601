"""Certificates of servers: the one that an enrolling process makes itself, and those of a fleet's others."""

from __future__ import annotations

import datetime
import hashlib
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey

from perfit_cloud.service.identity.authenticator import unknown_identity
from perfit_cloud.service.identity.authorities import AuthorityFiles
from perfit_cloud.service.identity.certificates import (
    check_lapse,
    check_proof,
    fresh_identity,
    key_hash,
    read_certificate,
    read_csr,
    server_of,
)
from perfit_cloud.service.identity.challenges import Challenges
from perfit_cloud.service.identity.server_files import ServerFiles
from perfit_cloud.service.identity.server_identity import ServerIdentity
from perfit_cloud.service.identity.store import Enrolment, IdentityStore
from perfit_shared.errors import CertificateExpired, IdentityRevoked, InvalidInput, NotAuthenticated
from perfit_shared.sealing.keys import PublicSealingKey, is_key_id

__all__ = [
    "MOST_SEALING_SECONDS",
    "RENEW_SERVER_CONTEXT",
    "IssuedServer",
    "SealingKeyRequest",
    "ServerAuthority",
]

RENEW_SERVER_CONTEXT = b"perfit-renew-server-v1"  # what is signed for it can be taken for nothing else
_CERTIFY_CONTEXT = b"perfit-certify-sealing-key-v1"
_OWN_LIFE = datetime.timedelta(days=90)
_FLEET_LIFE = datetime.timedelta(days=7)  # of a server that renews its own each hour
# Of a key that a fleet's server has certified, so that a withdrawn one seals no longer than it serves.
MOST_SEALING_SECONDS = int(_FLEET_LIFE.total_seconds())
_LONGEST_LABEL = 100  # characters


@dataclass(frozen=True)
class IssuedServer:
    """A server's next certificate, and what it has to trust; all DER."""

    certificate: bytes
    server_cas: tuple[bytes, ...]  # the one that signed it first
    device_cas: tuple[bytes, ...]


@dataclass(frozen=True)
class SealingKeyRequest:
    """What a server wants to have certified: a key that calls may be sealed to."""

    x25519: bytes  # public half, 32 bytes
    mlkem: bytes  # public half of ML-KEM-768, 1,184 bytes
    key_id: str
    life_seconds: int

    @classmethod
    def of(cls, key: PublicSealingKey, key_id: str, life_seconds: int) -> Self:
        return cls(key.x25519.public_bytes_raw(), key.mlkem.public_bytes_raw(), key_id, life_seconds)

    def signed(self, nonce: bytes) -> bytes:
        """What the server's own key signs. Everything before the id has one length."""
        life = self.life_seconds.to_bytes(4, "big")
        return _CERTIFY_CONTEXT + nonce + self.x25519 + self.mlkem + life + self.key_id.encode()

    def key(self) -> PublicSealingKey:
        """Raises InvalidInput unless the halves are keys, and the rest is within bounds."""
        if not is_key_id(self.key_id) or not 0 < self.life_seconds <= MOST_SEALING_SECONDS:
            raise InvalidInput(
                "a sealing key should have an id that metadata can carry, and live 7 days at most"
            )
        try:
            return PublicSealingKey(
                X25519PublicKey.from_public_bytes(self.x25519),
                MLKEM768PublicKey.from_public_bytes(self.mlkem),
            )
        except ValueError:
            raise InvalidInput("these are not the halves of a sealing key") from None


class ServerAuthority:
    """Thread-safe."""

    def __init__(
        self,
        server_ca: AuthorityFiles,
        device_ca: AuthorityFiles,
        store: IdentityStore,
        challenges: Challenges,
        *,
        lapse_seconds: int,
        check_identity: Callable[[str], None],
    ) -> None:
        """`check_identity` raises what is said to a caller of that identity, by what is known this moment."""
        self._check_identity = check_identity
        self._server_ca, self._device_ca = server_ca, device_ca
        self._store, self._challenges, self._lapse = store, challenges, lapse_seconds

    def identity(self, names: Sequence[str]) -> ServerIdentity:
        """A fresh key and certificate for `names`, of the process that has the authority."""
        key = ec.generate_private_key(ec.SECP256R1())
        authority = self._server_ca.get().current
        return ServerIdentity.of(key, authority.issue_server(key.public_key(), names, _OWN_LIFE))

    def is_current(self, identity: ServerIdentity) -> bool:
        """Whether the authority that signs now signed it."""
        return self._server_ca.get().current.certificate.subject == identity.certificate.issuer

    def certify_sealing_key(self, key: PublicSealingKey, key_id: str, life_seconds: int) -> bytes:
        """The server CA's certificate, DER, for a key that calls may be sealed to."""
        life = datetime.timedelta(seconds=life_seconds)
        certificate = self._server_ca.get().current.issue_sealing(key, key_id, life)
        return certificate.public_bytes(serialization.Encoding.DER)

    def write_files(self, folder: Path, names: Sequence[str]) -> str:
        """Write what a server without the role enrolment begins with; returns its identity.

        The identity stands on the list of devices, labelled as a server's: revoked, it renews no more.
        Several servers may begin with the same files.
        """
        key, identity = ec.generate_private_key(ec.SECP256R1()), fresh_identity()
        issued = int(time.time())
        authority = self._server_ca.get()  # after that moment: a rotation waits for all of before
        certificate = authority.current.issue_server(key.public_key(), names, _FLEET_LIFE, identity=identity)
        expires = int(certificate.not_valid_after_utc.timestamp())
        # Identities come by invites alone, so this one is invited and there at once.
        secret_hash = hashlib.sha256(secrets.token_bytes(32)).digest()
        self._store.add_invite(secret_hash, expires, f"server {' '.join(names)}"[:_LONGEST_LABEL])
        enrolment = Enrolment(identity, key_hash(key.public_key()), b"")
        self._store.enroll(secret_hash, enrolment, issued=issued, expires=expires)
        ServerFiles(folder).write(
            ServerIdentity.of(key, certificate),
            server_cas=authority.certificates,
            device_cas=self._device_ca.get().certificates,
        )
        return identity

    def renew(self, *, certificate: bytes, nonce: bytes, signature: bytes, csr: bytes) -> IssuedServer:
        """The next certificate of a server, against the one that it has, and proof of its key.

        The nonce is spent last. Raises NotAuthenticated, CertificateExpired, IdentityRevoked, InvalidInput.
        """
        old, new_key = read_certificate(certificate), read_csr(csr)
        identity, names = self._proven(old, RENEW_SERVER_CONTEXT + nonce + csr, signature)
        check_lapse(old, self._lapse)
        self._challenges.use(nonce)
        issued = int(time.time())
        expires = issued + int(_FLEET_LIFE.total_seconds())
        # No certificate of a server retires another: several began with the same files.
        if self._store.renew(identity, generation=0, issued=issued, expires=expires) is None:
            if self._store.matching(identity):
                raise _withdrawn()
            raise unknown_identity()
        authority = self._server_ca.get()  # after `issued`: a rotation waits for all of before
        new = authority.current.issue_server(new_key, names, _FLEET_LIFE, identity=identity)
        der = serialization.Encoding.DER
        return IssuedServer(
            new.public_bytes(der),
            tuple(ca.public_bytes(der) for ca in authority.certificates),
            tuple(ca.public_bytes(der) for ca in self._device_ca.get().certificates),
        )

    def certify(
        self, request: SealingKeyRequest, *, certificate: bytes, nonce: bytes, signature: bytes
    ) -> bytes:
        """A certificate, DER, for a sealing key of a server, against the server's own and proof of its key.

        The nonce is spent last. Raises NotAuthenticated, CertificateExpired, IdentityRevoked, InvalidInput,
        Busy, StoreFailed.
        """
        own, key = read_certificate(certificate), request.key()
        identity, _ = self._proven(own, request.signed(nonce), signature)
        if not own.not_valid_before_utc.timestamp() <= time.time() <= own.not_valid_after_utc.timestamp():
            raise CertificateExpired("this server's certificate does not hold now; it can be renewed")
        try:
            self._check_identity(identity)
        except IdentityRevoked:
            raise _withdrawn() from None
        self._challenges.use(nonce)
        return self.certify_sealing_key(key, request.key_id, request.life_seconds)

    def _proven(
        self, certificate: x509.Certificate, signed: bytes, signature: bytes
    ) -> tuple[str, list[str]]:
        """(identity, names) of the server that has this certificate and its key. Raises NotAuthenticated."""
        # Only if we issued it: the library raises on keys of unknown kinds.
        if not self._server_ca.get().issued(certificate):
            raise NotAuthenticated("this cloud did not issue this certificate of a server")
        found = server_of(certificate)
        check_proof(certificate, signed, signature)
        return found


def _withdrawn() -> IdentityRevoked:
    return IdentityRevoked("this server was withdrawn; make it new files with `perfit-cloud server`")
