"""Who sealed a call, by the proof inside, and whether the call was sent before.

A device shows its certificate once to a process, and its fingerprint from then on: the certificate would be
a third of what sealing adds to a call.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections import OrderedDict
from collections.abc import Callable

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec

from perfit_cloud.service.identity.certificates import identity_of, read_certificate
from perfit_shared.errors import Busy, NotAuthenticated, SealBroken, SealUnknown
from perfit_shared.sealing.calls import VALID_MS, fingerprint_of
from perfit_shared.wire import sealing_pb2 as pb

__all__ = ["KnownCertificates", "Replays"]

_CERTIFICATE_CAP = 4096  # bytes; a device's takes 500
_DIGEST_BYTES = 16
# An encapsulation is good from VALID_MS before its time to VALID_MS after it.
_REMEMBERED_SECONDS = 2 * VALID_MS / 1000
_MOST_REPLAYS = 2**20  # of calls within that, some 100 bytes each


class KnownCertificates:
    """Certificates of devices that proofs showed: of each device the last. Thread-safe.

    They hold no more than the identity database does. Beyond `most`, the device that was silent for the
    longest goes. They are kept as they came, 0.9 KB each: a parsed one whose fields were read takes 6.5 KB,
    and parsing takes 0.02 ms.
    """

    def __init__(self, device_ca_pem: Callable[[], bytes], most: int) -> None:
        """`device_ca_pem`: all authorities of devices that hold now. `most`: devices."""
        self._device_ca_pem, self._most = device_ca_pem, most
        self._lock = threading.Lock()
        self._issued_by = b""
        self._known: OrderedDict[bytes, tuple[str, bytes]] = OrderedDict()  # fingerprint → (identity, DER)
        self._last: dict[str, bytes] = {}  # identity → fingerprint

    def __len__(self) -> int:
        return len(self._known)

    def of(self, proof: pb.SealedProof) -> x509.Certificate:
        """The certificate that is shown, or was. Others ask whether it may call, and who holds its key.

        Remembers nothing.

        Raises NotAuthenticated when no authority of this cloud issued it, and SealUnknown.
        """
        authorities = self._device_ca_pem()
        with self._lock:
            if authorities != self._issued_by:
                self._known.clear()
                self._last.clear()
                self._issued_by = authorities
            _, found = self._known.get(proof.fingerprint, ("", b""))
            if found:
                self._known.move_to_end(proof.fingerprint)
        if found:
            return read_certificate(found)
        if not proof.certificate:
            raise SealUnknown("this server has not seen the certificate yet; seal anew and show it")
        if fingerprint_of(proof.certificate) != proof.fingerprint:
            raise SealBroken("a sealed call shows another certificate than it names")
        return _issued(proof.certificate, authorities)

    def remember(self, proof: pb.SealedProof, certificate: x509.Certificate) -> None:
        """That its holder called. Only whoever proved that takes the place of the device's last one.

        Raises NotAuthenticated as `of` does.
        """
        if not proof.certificate:
            return
        identity, authorities = identity_of(certificate), self._device_ca_pem()
        _issued(proof.certificate, authorities)  # they may have changed since
        with self._lock:
            if authorities != self._issued_by or proof.fingerprint in self._known:
                return
            self._known.pop(self._last.get(identity, b""), None)
            self._known[proof.fingerprint] = identity, proof.certificate
            self._last[identity] = proof.fingerprint
            if len(self._known) > self._most:
                _, (oldest, _) = self._known.popitem(last=False)
                del self._last[oldest]


class Replays:
    """The encapsulations of the last minutes: each is good once. Thread-safe."""

    def __init__(self, most: int = _MOST_REPLAYS, clock: Callable[[], float] = time.monotonic) -> None:
        self._most, self._clock = most, clock
        self._lock = threading.Lock()
        self._now: set[bytes] = set()
        self._before: set[bytes] = set()
        self._since = clock()

    def check(self, sealed: bytes) -> None:
        """Raises SealBroken when it was there before. Remembers nothing."""
        digest = _digest(sealed)
        with self._lock:
            self._check(digest)

    def add(self, sealed: bytes) -> None:
        """Raises SealBroken when it was there before, and Busy when more came than can be remembered."""
        digest = _digest(sealed)
        with self._lock:
            passed = self._clock() - self._since
            if passed >= _REMEMBERED_SECONDS:
                # What is in `before` then came at least that long ago.
                self._before = self._now if passed < 2 * _REMEMBERED_SECONDS else set()
                self._now, self._since = set(), self._clock()
            self._check(digest)
            if len(self._now) + len(self._before) >= self._most:
                wait_ms = int(1000 * max(1.0, _REMEMBERED_SECONDS - passed))
                raise Busy("this server got more sealed calls than it can tell apart", retry_ms=wait_ms)
            self._now.add(digest)

    def _check(self, digest: bytes) -> None:
        if digest in self._now or digest in self._before:
            raise SealBroken("this sealed call was sent before; something on the way repeats calls")


def _digest(sealed: bytes) -> bytes:
    return hashlib.sha256(sealed).digest()[:_DIGEST_BYTES]


def _issued(data: bytes, authorities: bytes) -> x509.Certificate:
    """A P-256 certificate that one of these issued. Raises NotAuthenticated."""
    if len(data) > _CERTIFICATE_CAP:
        raise NotAuthenticated("not a certificate; enrol with `perfit enroll`")
    certificate = read_certificate(data)
    for authority in x509.load_pem_x509_certificates(authorities):
        try:
            certificate.verify_directly_issued_by(authority)
            if isinstance(certificate.public_key(), ec.EllipticCurvePublicKey):
                return certificate
        except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm):
            continue
    raise NotAuthenticated("this cloud did not issue that certificate; enrol with `perfit enroll`")
