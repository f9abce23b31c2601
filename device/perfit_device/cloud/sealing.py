"""What a device seals calls by: the keys of the server behind a front, and the messages of one call.

It takes the server's keys from a `Describe` in the clear, of which nothing else is used, and only such as the
cloud's own CA signed. Where there is none it sends nothing: a front cannot talk a device out of sealing.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from perfit_device.cloud.identity import Enrolment
from perfit_shared.errors import NotAuthenticated, SealBroken, SealRequired, SealUnknown, Unavailable
from perfit_shared.sealing.calls import (
    KEY_METADATA,
    CallHeader,
    CallSecret,
    fingerprint_of,
    named_artefact,
    sign_proof,
)
from perfit_shared.sealing.chunks import ChunkOpener, ChunkSealer
from perfit_shared.sealing.keys import EvidenceVerifier, SealingKey
from perfit_shared.wire import personalization_pb2 as pb
from perfit_shared.wire import sealing_pb2 as sealing

__all__ = ["SealedCall", "Sealer", "Sealing", "trusted_roots"]


@dataclass(frozen=True)
class Sealing:
    """That calls are sealed, and what else is trusted for that."""

    front_roots: bytes = b""  # PEM: whom a front's TLS certificate may come from, besides the cloud's own CA
    verifier: EvidenceVerifier | None = None  # of what runs where a key is; None: nobody asks
    pads: bool = True  # False: to measure what padding costs


def trusted_roots(enrolment: Enrolment, sealing: Sealing | None) -> bytes:
    """PEM: whom the certificate of what answers at the cloud's addresses may come from."""
    return enrolment.roots + (b"" if sealing is None else sealing.front_roots)


class Sealer:
    """Begins sealed calls for one identity. Thread-safe."""

    def __init__(
        self, enrolment: Enrolment, settings: Sealing, fetch: Callable[[], Iterable[pb.SealingKey]]
    ) -> None:
        """`fetch` asks the cloud for its keys, in the clear."""
        self.enrolment, self.settings = enrolment, settings
        self.fingerprint = fingerprint_of(enrolment.certificate)
        self._fetch = fetch
        self._lock = threading.Lock()
        self._keys: Sequence[SealingKey] = ()
        self._failed_at = -math.inf  # by the monotonic clock: when the last try to fetch them ended
        self._known_to: set[str] = set()  # ids of keys whose server has seen the certificate

    def key(self) -> SealingKey:
        """The key to seal to now, fetched where there is none.

        Raises SealRequired, NotAuthenticated, what `fetch` raises, and Unavailable when another thread's try
        failed meanwhile: with a cloud that says nothing each would wait after the other.
        """
        asked_at = time.monotonic()
        with self._lock:
            found = next((key for key in self._keys if key.is_current()), None)
            if found is None:
                if self._failed_at > asked_at:
                    raise Unavailable("the cloud's sealing keys could not be had just now; try again")
                try:
                    self._keys = self._fetched()
                except BaseException:
                    self._failed_at = time.monotonic()
                    raise
                found = self._keys[0]
            return found

    def forget(self, key_id: str) -> None:
        """The server that answers has no such key: the next call asks which it has."""
        with self._lock:
            self._keys = [key for key in self._keys if key.key_id != key_id]
            self._known_to.discard(key_id)

    def shows_certificate(self, key_id: str) -> bool:
        return key_id not in self._known_to

    def was_answered(self, key_id: str) -> None:
        self._known_to.add(key_id)

    def _fetched(self) -> list[SealingKey]:
        """Those that hold now. Raises SealRequired and NotAuthenticated."""
        given = list(self._fetch())
        keys = []
        for each in given:
            key = SealingKey.from_certificate(each.certificate, *self.enrolment.server_cas)
            if self.settings.verifier is not None:
                self.settings.verifier.verify(each.evidence, key.public.binding)
            keys.append(key)
        if not keys:
            raise SealRequired(
                f"this profile seals its calls, and the cloud at {self.enrolment.address} offers no key for "
                "that; nothing was sent; ask its operator"
            )
        current = [key for key in keys if key.is_current()]
        if not current:
            raise NotAuthenticated(
                "by this device's clock none of the cloud's sealing keys holds; set the clock, or tell its "
                "operator"
            )
        return current


class SealedCall:
    """One call: its requests are sealed by one thread, its responses opened by one."""

    def __init__(self, sealer: Sealer, method: str) -> None:
        self._sealer, self._method, self._key = sealer, method, sealer.key()
        self.metadata = ((KEY_METADATA, self._key.key_id),)
        self._secret: CallSecret | None = None
        self._chunks: ChunkSealer | None = None
        self._opener: ChunkOpener | None = None

    def seal(self, request: Any, payload: bytes, *, last: bool) -> bytes:
        """A SealedRequest; the first also opens the call. `payload` is `request`, written."""
        if self._chunks is not None:
            return sealing.SealedRequest(chunk=self._chunks.seal(payload, last=last)).SerializeToString()
        sealer, key = self._sealer, self._key
        header = CallHeader(self._method, key.key_id, named_artefact(request), int(1000 * time.time()))
        self._secret = secret = CallSecret.seal(key.public, header)
        self._chunks = chunks = ChunkSealer(secret.request_keys(), pads=sealer.settings.pads)
        shows = sealer.shows_certificate(key.key_id)
        proof = sealing.SealedProof(
            certificate=sealer.enrolment.certificate if shows else b"",
            fingerprint=sealer.fingerprint,
            signature=sign_proof(sealer.enrolment.identity.key, header, secret.sealed),
        )
        opening = sealing.SealedOpening(
            time_ms=header.time_ms,
            artefact=header.artefact,
            encapsulated=secret.sealed,
            proof=chunks.seal(proof.SerializeToString()),
        )
        chunk = chunks.seal(payload, last=last)
        return sealing.SealedRequest(opening=opening, chunk=chunk).SerializeToString()

    def open(self, data: bytes, *, is_only: bool) -> bytes | None:
        """The response in a message; None for the empty one that ends a stream. Raises SealBroken."""
        try:
            message = sealing.SealedResponse.FromString(data)
        except DecodeError:
            raise SealBroken("this is no sealed message; something on the way altered it") from None
        if self._opener is None:
            if self._secret is None:
                raise SealBroken("an answer came before anything was asked")
            self._opener = ChunkOpener(self._secret.response_keys(message.random))
        payload = self._opener.open(message.chunk)
        self._sealer.was_answered(self._key.key_id)
        if is_only:
            self._opener.check_complete()
        elif self._opener.is_complete and not payload:
            return None
        return payload

    def check_complete(self) -> None:
        """Raises SealBroken when responses ended before the last."""
        if self._opener is None:
            raise SealBroken("the cloud's answer breaks off before it began; something on the way cut it")
        self._opener.check_complete()

    def failed(self, error: grpc.RpcError) -> None:
        """Learn from an error that the server which got the call cannot open it."""
        trailing: Any = error.trailing_metadata() if isinstance(error, grpc.Call) else None
        if ("perfit-code", SealUnknown.code) in [(str(key), str(value)) for key, value in trailing or ()]:
            self._sealer.forget(self._key.key_id)
