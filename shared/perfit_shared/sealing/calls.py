"""Beginning a sealed call: what both sides derive from one secret, and what the device proves.

    info     = "perfit-seal-v1" · method · key id · artefact (each behind its length) · time
    sealed   = HPKE(public key, info, secret of 32 random bytes), its encapsulated key in front
    request  = HKDF-SHA256(secret, salt = sealed, "perfit request …")
    response = HKDF-SHA256(secret, salt = sealed · the server's 32 random bytes, "perfit response …")

as RFC 9458 derives the keys of its responses. A request that is replayed makes a server answer under another
key, so no key and number ever seal two messages. All that `info` says is bound into both keys.

HPKE's base mode says nothing of who seals. So chunk 0 of the request, which the server's key alone opens, has
a signature with the key of the device's certificate over `info` and `sealed`: a front that ends the device's
TLS can neither seal in its name nor see in a call which device calls (its handshake may ask for the
device's certificate). The signature covers this server's key and this
method and time, so that a server that was sent a call cannot pass it on as its own.
"""

from __future__ import annotations

import hashlib
import os
import struct
from dataclasses import dataclass, field
from typing import Any

from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from perfit_shared.errors import SealBroken
from perfit_shared.sealing.chunks import KEY_BYTES, NONCE_BYTES, ChunkKeys
from perfit_shared.sealing.keys import PrivateSealingKey, PublicSealingKey

__all__ = [
    "KEY_METADATA",
    "RANDOM_BYTES",
    "VALID_MS",
    "CallHeader",
    "CallSecret",
    "check_proof",
    "fingerprint_of",
    "named_artefact",
    "sign_proof",
]

KEY_METADATA = "perfit-seal-key"  # of a sealed call: the id of the key
VALID_MS = 300_000  # either way of the server's clock: what certificates allow clocks to differ, too
RANDOM_BYTES = 32
_SECRET_BYTES = 32
_NUMBER_BYTES = 32  # of a signature's r and s
_FINGERPRINT_BYTES = 16  # to find another certificate with the same takes 2¹²⁸ tries
_LABEL, _PROOF_LABEL = b"perfit-seal-v1", b"perfit-seal-proof-v1"
_SUITE = Suite(KEM.MLKEM768_X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM)
_SEALED_BYTES = KEM.MLKEM768_X25519.enc_length() + _SECRET_BYTES + 16


@dataclass(frozen=True)
class CallHeader:
    """What is in the clear, and bound into all that is sealed."""

    method: str  # "/perfit.v1.Personalization/Generate"
    key_id: str
    artefact: str  # that the first request names, or ""
    time_ms: int  # unix

    def encode(self) -> bytes:
        """Raises SealBroken on what has no place in one."""
        parts = [text.encode() for text in (self.method, self.key_id, self.artefact)]
        try:
            return b"".join(
                (_LABEL, *(struct.pack(">H", len(p)) + p for p in parts), struct.pack(">Q", self.time_ms))
            )
        except struct.error:
            raise SealBroken(
                "a sealed call names something that is too long, or an impossible time"
            ) from None


@dataclass(frozen=True)
class CallSecret:
    """What both sides know of one call."""

    sealed: bytes  # as it travels
    _secret: bytes = field(repr=False)

    @classmethod
    def seal(cls, key: PublicSealingKey, header: CallHeader) -> CallSecret:
        """A new one, on the device."""
        secret = os.urandom(_SECRET_BYTES)
        return cls(_SUITE.encrypt(secret, key.hpke, info=header.encode()), secret)

    @classmethod
    def open(cls, key: PrivateSealingKey, header: CallHeader, sealed: bytes) -> CallSecret:
        """The device's, on the server. Raises SealBroken when it is sealed to another key, or otherwise."""
        info = header.encode()
        try:
            if len(sealed) != _SEALED_BYTES:
                raise ValueError("another length")
            return cls(sealed, _SUITE.decrypt(sealed, key.hpke, info=info))
        except (InvalidTag, ValueError):
            raise SealBroken("a sealed call cannot be opened: something on the way altered it") from None

    def request_keys(self) -> ChunkKeys:
        return self._keys(self.sealed, b"request")

    def response_keys(self, random: bytes) -> ChunkKeys:
        """`random`: the server's. Raises SealBroken when it is no 32 bytes."""
        if len(random) != RANDOM_BYTES:
            raise SealBroken("a sealed answer does not begin as it should; something on the way altered it")
        return self._keys(self.sealed + random, b"response")

    def _keys(self, salt: bytes, direction: bytes) -> ChunkKeys:
        key, nonce = bytearray(KEY_BYTES), bytearray(NONCE_BYTES)
        for into, what in ((key, b"key"), (nonce, b"nonce")):
            info = b"perfit " + direction + b" " + what
            HKDF(hashes.SHA256(), len(into), salt, info).derive_into(self._secret, into)
        keys = ChunkKeys(AESGCM(key), bytes(nonce))
        key[:] = bytes(KEY_BYTES)
        return keys


def sign_proof(key: ec.EllipticCurvePrivateKey, header: CallHeader, sealed: bytes) -> bytes:
    """ECDSA-SHA256, r · s (64 bytes): that the holder of the device's P-256 key began this call."""
    signature = key.sign(_PROOF_LABEL + header.encode() + sealed, ec.ECDSA(hashes.SHA256()))
    return b"".join(number.to_bytes(_NUMBER_BYTES, "big") for number in decode_dss_signature(signature))


def check_proof(key: ec.EllipticCurvePublicKey, signature: bytes, header: CallHeader, sealed: bytes) -> None:
    """Raises SealBroken when another key signed, or another call."""
    r, s = (int.from_bytes(half, "big") for half in (signature[:_NUMBER_BYTES], signature[_NUMBER_BYTES:]))
    try:
        if len(signature) != 2 * _NUMBER_BYTES:
            raise InvalidSignature
        signed = _PROOF_LABEL + header.encode() + sealed
        key.verify(encode_dss_signature(r, s), signed, ec.ECDSA(hashes.SHA256()))
    except InvalidSignature:
        raise SealBroken("a sealed call is not signed by the certificate that it shows") from None


def fingerprint_of(certificate: bytes) -> bytes:
    """What names a certificate (DER) that was shown before: 16 bytes of its SHA-256."""
    return hashlib.sha256(certificate).digest()[:_FINGERPRINT_BYTES]


def named_artefact(request: Any) -> str:
    """The artefact that the first request (a message of the wire) of any method names, or ""."""
    within = getattr(request, "shift", None) or getattr(request, "open", None) or request
    return str(getattr(within, "artefact", ""))
