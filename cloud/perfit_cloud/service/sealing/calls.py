"""A sealed call on the server: opened, checked against its proof, answered under a key of its own."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from google.protobuf.message import DecodeError

from perfit_cloud.service.identity.authenticator import Authenticator
from perfit_cloud.service.sealing.callers import KnownCertificates, Replays
from perfit_cloud.service.sealing.keys import ReplicaKeys
from perfit_shared.errors import NotAuthenticated, SealBroken, SealUnknown
from perfit_shared.sealing.calls import (
    RANDOM_BYTES,
    VALID_MS,
    CallHeader,
    CallSecret,
    check_proof,
    named_artefact,
)
from perfit_shared.sealing.chunks import ChunkOpener, ChunkSealer
from perfit_shared.wire import sealing_pb2 as pb

__all__ = ["SealedCall", "SealedCalls"]


class SealedCalls:
    """Opens calls that are sealed to this process. Thread-safe."""

    def __init__(self, keys: ReplicaKeys, authenticator: Authenticator, *, certificates: int) -> None:
        """`certificates`: of so many devices are remembered."""
        self.keys = keys
        self._certificates = KnownCertificates(lambda: authenticator.device_ca_pem, certificates)
        self._replays = Replays()

    def open(self, method: str, key_id: str, data: bytes) -> SealedCall:
        """The call that this first message begins.

        Whether its caller may call is asked by who calls this, and then `take`. Raises SealUnknown,
        SealBroken, NotAuthenticated.
        """
        message = _parsed(data)
        opening, chunk = message.opening, message.chunk
        key = self.keys.get(key_id)
        if key is None:
            raise SealUnknown("this server does not have the key that the call is sealed to; seal it anew")
        if abs(opening.time_ms - 1000 * time.time()) > VALID_MS:
            raise SealBroken(
                "the time of a sealed call is more than five minutes from the cloud's; set this device's "
                "clock, or something on the way held the call back"
            )
        self._replays.check(opening.encapsulated)  # a look-up spares the dear part
        header = CallHeader(method, key_id, opening.artefact, opening.time_ms)
        secret = CallSecret.open(key, header, opening.encapsulated)
        opener = ChunkOpener(secret.request_keys())
        certificate = self._proven(opener.open(opening.proof), header, secret.sealed)
        random = os.urandom(RANDOM_BYTES)
        answers = random, ChunkSealer(secret.response_keys(random))
        return SealedCall(certificate, header, secret.sealed, first=chunk, opener=opener, answers=answers)

    def take(self, call: SealedCall) -> None:
        """Take a call, once, whose caller may call: nobody else fills what is remembered of calls.

        Raises SealBroken, Busy.
        """
        self._replays.add(call.sealed)

    def _proven(self, proof: bytes, header: CallHeader, sealed: bytes) -> x509.Certificate:
        try:
            shown = pb.SealedProof.FromString(proof)
        except DecodeError:
            raise SealBroken("a sealed call proves nothing; update perfit") from None
        certificate = self._certificates.of(shown)
        key = certificate.public_key()
        if not isinstance(key, ec.EllipticCurvePublicKey):
            raise NotAuthenticated("a device's key should be P-256")
        check_proof(key, shown.signature, header, sealed)
        self._certificates.remember(shown, certificate)
        return certificate


class SealedCall:
    """One call. Its requests are opened by one thread, its responses sealed by one."""

    def __init__(
        self,
        certificate: x509.Certificate,
        header: CallHeader,
        sealed: bytes,
        *,
        first: bytes,
        opener: ChunkOpener,
        answers: tuple[bytes, ChunkSealer],
    ) -> None:
        """`first`: the first payload, still sealed. `answers`: this server's random bytes, and what seals."""
        self.certificate = certificate  # of the device
        self.sealed = sealed  # the encapsulation, which is good once
        self._artefact: str | None = header.artefact  # None: checked
        self._first: bytes | None = first  # until it is opened
        self._opener = opener
        self._random, self._sealer = answers  # the random bytes until they are sent

    def messages(self, first: bytes, rest: Iterator[bytes]) -> Iterator[bytes]:
        """All messages as they came. Raises SealBroken where they end before the last."""
        yield first
        yield from rest
        self._opener.check_complete()

    def open(self, data: bytes, *, is_only: bool) -> bytes | None:
        """The request in a message; None for the empty one that ends a stream. Raises SealBroken.

        `is_only`: the method takes one message.
        """
        chunk = self._first
        if chunk is None:
            message = _parsed(data)
            if message.HasField("opening"):
                raise SealBroken("a sealed call opens twice; update perfit")
            chunk = message.chunk
        self._first = None
        payload = self._opener.open(chunk)
        if is_only:
            self._opener.check_complete()
        elif self._opener.is_complete and not payload:
            return None
        return payload

    def check(self, request: Any) -> None:
        """Raises SealBroken when the first request names another artefact than stands in the clear."""
        if self._artefact is not None and named_artefact(request) != self._artefact:
            raise SealBroken("a sealed call names two artefacts; update perfit")
        self._artefact = None

    @property
    def is_answered(self) -> bool:
        """Whether the last response was sealed."""
        return self._sealer.is_over

    def seal(self, response: bytes, *, last: bool) -> bytes:
        """A SealedResponse."""
        random, self._random = self._random, b""
        chunk = self._sealer.seal(response, last=last)
        return pb.SealedResponse(random=random, chunk=chunk).SerializeToString()


def _parsed(data: bytes) -> pb.SealedRequest:
    try:
        return pb.SealedRequest.FromString(data)
    except DecodeError:
        raise SealBroken("this is no sealed message; something on the way altered it") from None
