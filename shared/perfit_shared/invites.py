"""An invite: the one string that an operator hands to a device's owner.

    "perfit1-" base64url( body · first 8 bytes of sha-256(body) ), without padding
    body = version (1 byte) · expiry (u64, unix seconds) · secret (32 bytes)
           · length (u16) · address (UTF-8 host:port) · length (u16) · server CA (X.509 DER)

The checksum finds a slip in copying; what an invite may do is the cloud's to check, by its secret.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import struct
from dataclasses import dataclass, field
from datetime import UTC, datetime

from perfit_shared.errors import InvalidInvite, InviteRefused

__all__ = ["Invite"]

_PREFIX = "perfit1-"
_VERSION = 1
_HEAD = struct.Struct(">BQ32s")
_LENGTH = struct.Struct(">H")
_CHECKSUM_BYTES = 8
_LONGEST = 16 * 1024  # characters; a real one has about 600


@dataclass(frozen=True)
class Invite:
    """Where to enrol, whom to trust there, until when, and the secret that allows it once."""

    address: str  # host:port of the enrolment listener, or several with commas
    server_ca_der: bytes  # X.509, DER: the only root that this cloud's servers chain to
    expires_unix: int  # seconds
    secret: bytes = field(repr=False)  # 32 bytes

    def check_expiry(self) -> None:
        """Raises InviteRefused when its time is over."""
        if datetime.now(UTC).timestamp() >= self.expires_unix:
            try:
                when = f"{datetime.fromtimestamp(self.expires_unix, UTC):%Y-%m-%d %H:%M} UTC"
            except (OverflowError, ValueError, OSError):
                when = "an impossible date"
            raise InviteRefused(f"this invite expired on {when}; ask the operator for a new one")

    def encode(self) -> str:
        """The string. Raises InvalidInvite on a field that has no place in one."""
        address = self.address.encode()
        if len(self.secret) != 32 or not 0 <= self.expires_unix < 2**63:
            raise InvalidInvite("an invite needs a secret of 32 bytes and an expiry")
        if not 0 < len(address) < 512 or not 0 < len(self.server_ca_der) < 8192:
            raise InvalidInvite("an invite needs an address and a CA certificate of sane length")
        body = _HEAD.pack(_VERSION, self.expires_unix, self.secret)
        for part in (address, self.server_ca_der):
            body += _LENGTH.pack(len(part)) + part
        return _PREFIX + base64.urlsafe_b64encode(body + _checksum(body)).decode().rstrip("=")

    @classmethod
    def decode(cls, text: str) -> Invite:
        """Raises InvalidInvite when the text is none that `encode` makes: altered or cut on the way."""
        text = "".join(text.split())  # mail clients wrap long words
        if not text.startswith(_PREFIX):
            raise InvalidInvite(f'this is not an invite: one starts with "{_PREFIX}"')
        encoded = text[len(_PREFIX) :]
        if len(encoded) > _LONGEST:
            raise InvalidInvite("this is not an invite: it is far too long")
        broken = InvalidInvite("the invite was altered or cut on the way; copy it again, whole")
        try:
            data = base64.b64decode(encoded + "=" * (-len(encoded) % 4), altchars=b"-_", validate=True)
        except (binascii.Error, ValueError) as error:
            raise broken from error
        body, checksum = data[:-_CHECKSUM_BYTES], data[-_CHECKSUM_BYTES:]
        if checksum != _checksum(body):
            raise broken
        if body[:1] != bytes([_VERSION]):
            raise InvalidInvite("this invite is of a newer format; update perfit")
        try:
            _, expires, secret = _HEAD.unpack_from(body)
            address, rest = _take(body[_HEAD.size :])
            server_ca, _ = _take(rest)
            invite = cls(address.decode(), server_ca, expires, secret)
        except (struct.error, UnicodeDecodeError) as error:
            raise broken from error
        if invite.encode() != text:  # base64 has spare bits, and one invite should have one spelling
            raise broken
        return invite


def _checksum(body: bytes) -> bytes:
    return hashlib.sha256(body).digest()[:_CHECKSUM_BYTES]


def _take(data: bytes) -> tuple[bytes, bytes]:
    (length,) = _LENGTH.unpack_from(data)
    if len(data) < _LENGTH.size + length:
        raise struct.error("cut short")
    return data[_LENGTH.size : _LENGTH.size + length], data[_LENGTH.size + length :]
