"""The messages of one direction of a sealed call: numbered, padded, the last one marked.

    chunk n = AES-256-GCM(key, nonce XOR n, payload · mark · zeros)      mark: one byte, 1, or 2 of the last

The number of a chunk is its nonce, and the mark parts payload and padding, as in TLS 1.3: a chunk that is
left out, repeated or moved does not open. Nobody seals twice under one key and number: a direction's key is
of one call and one sender, who counts.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from perfit_shared.errors import SealBroken

__all__ = ["ChunkKeys", "ChunkOpener", "ChunkSealer", "most_sealed_bytes", "padded_size"]

KEY_BYTES, NONCE_BYTES, _TAG_BYTES = 32, 12, 16
_MORE, _LAST = b"\x01", b"\x02"  # marks
_LEAST_STEP = 64  # bytes
_STEPS = 3  # 2³ steps to a doubling: padding is an eighth of a message at most


@dataclass(frozen=True)
class ChunkKeys:
    """Of one direction of one call."""

    aead: AESGCM = field(repr=False)
    nonce: bytes = field(repr=False)  # 12 bytes

    def nonce_of(self, number: int) -> bytes:
        return (int.from_bytes(self.nonce, "big") ^ number).to_bytes(NONCE_BYTES, "big")


class ChunkSealer:
    """Not thread-safe: one thread sends."""

    def __init__(self, keys: ChunkKeys, *, pads: bool = True) -> None:
        """`pads`: False leaves sizes as they are, to measure what padding costs."""
        self._keys, self._pads = keys, pads
        self._number = 0
        self.is_over = False  # the last chunk was sealed

    def seal(self, payload: bytes, *, last: bool = False) -> bytes:
        """The next chunk. Nothing may follow the last one: raises ValueError."""
        if self.is_over:
            raise ValueError("nothing follows the last chunk")
        size = len(payload) + 1
        zeros = padded_size(size) - size if self._pads else 0
        plain = b"".join((payload, _LAST if last else _MORE, bytes(zeros)))
        nonce, self._number, self.is_over = self._keys.nonce_of(self._number), self._number + 1, last
        return self._keys.aead.encrypt(nonce, plain, None)


class ChunkOpener:
    """Not thread-safe: one thread receives."""

    def __init__(self, keys: ChunkKeys) -> None:
        self._keys = keys
        self._number = 0
        self.is_complete = False  # the last chunk was opened

    def open(self, chunk: bytes) -> bytes:
        """The payload of the next chunk. Raises SealBroken when it is any other, or altered."""
        if self.is_complete:
            raise SealBroken("a sealed message came after the last one; something on the way added it")
        try:
            plain = self._keys.aead.decrypt(self._keys.nonce_of(self._number), chunk, None)
        except (InvalidTag, ValueError, OverflowError):
            raise SealBroken(
                "a sealed message cannot be opened: something on the way altered it, left one out or changed "
                "their order"
            ) from None
        marked = plain.rstrip(b"\x00")
        mark = marked[-1:]
        if mark not in (_MORE, _LAST):
            raise SealBroken("a sealed message is not laid out as it should be; update perfit")
        self._number += 1
        self.is_complete = mark == _LAST
        return marked[:-1]

    def check_complete(self) -> None:
        """Raises SealBroken unless the last chunk was there."""
        if not self.is_complete:
            raise SealBroken(
                "the sealed messages break off before the last one; something on the way cut them"
            )


def padded_size(size: int) -> int:
    """The next step: of 64 bytes, or of an eighth of the power of two below."""
    step = max(_LEAST_STEP, 1 << max(0, size.bit_length() - 1 - _STEPS))
    return -(-size // step) * step


def most_sealed_bytes(size: int) -> int:
    """Of a SealedRequest or SealedResponse whose payload has at most `size`: an opening takes 2 KB."""
    return padded_size(size + 1) + _TAG_BYTES + 4096
