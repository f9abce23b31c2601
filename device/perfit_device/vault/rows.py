"""What a row of the vault holds before it is sealed: its name, and behind it its data."""

from __future__ import annotations

import hashlib

__all__ = ["digest_of", "pack", "unpack"]


def pack(name: str, data: bytes) -> bytes:
    encoded = name.encode()
    return len(encoded).to_bytes(4, "big") + encoded + data


def unpack(plain: bytes) -> tuple[str, bytes]:
    """(name, data)."""
    size = int.from_bytes(plain[:4], "big")
    return plain[4 : 4 + size].decode(), plain[4 + size :]


def digest_of(wrapped: bytes, sealed: bytes) -> bytes:
    """By which the list of rows knows what a row holds."""
    return hashlib.sha256(wrapped + sealed).digest()
