"""How a server without the role enrolment comes to its next certificate: it asks one that has it, every hour.

It proves that it holds its certificate's key by signing a nonce. With the certificate it learns the roots
that it has to trust from now on. While nobody answers, the certificate that it has holds for some days.
The certificates of its sealing keys come the same way, when `ReplicaKeys` has made one.
"""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from perfit_cloud.service.identity.certificates import read_certificate
from perfit_cloud.service.identity.server_authority import RENEW_SERVER_CONTEXT, SealingKeyRequest
from perfit_cloud.service.identity.server_files import ServerFiles
from perfit_cloud.service.identity.server_identity import ServerIdentity
from perfit_shared.errors import PerfitError, Unavailable, from_code
from perfit_shared.sealing.keys import PublicSealingKey, SealingKey
from perfit_shared.wire import enrollment_pb2 as pb
from perfit_shared.wire import enrollment_pb2_grpc as services

__all__ = ["ServerRenewal"]

_log = logging.getLogger(__name__)
_EVERY_SECONDS = 3600.0  # give or take a tenth, so that a fleet that started together spreads
_RETRY_SECONDS = 60.0
_CALL_SECONDS = 10.0


class ServerRenewal:
    """Without `start`, it asks only when told to. Thread-safe."""

    def __init__(self, files: ServerFiles, address: str) -> None:
        """`address`: host:port of an enrolment listener of the same cloud."""
        self._files, self._address = files, address
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="perfit-certificate", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._over.set()
        if self._thread.is_alive():
            self._thread.join(_CALL_SECONDS)

    def try_renew(self) -> bool:
        """Whether it worked; the log says why not."""
        try:
            self.renew()
        except (PerfitError, OSError) as error:
            _log.error(
                "this server's certificate was not renewed at %s: %s; it holds until %s",
                self._address,
                error,
                self._end(),
            )
            return False
        return True

    def renew(self) -> None:
        """Ask for the next certificate, and keep it. Raises PerfitError, OSError."""
        old, key = self._files.identity(), ec.generate_private_key(ec.SECP256R1())
        csr = _request(key)
        with self._challenged() as (servers, nonce):
            answer = _called(
                servers.RenewServer,
                pb.RenewServerRequest(
                    certificate=old.certificate.public_bytes(serialization.Encoding.DER),
                    nonce=nonce,
                    signature=old.key.sign(RENEW_SERVER_CONTEXT + nonce + csr, ec.ECDSA(hashes.SHA256())),
                    csr=csr,
                ),
            )
        certificate = read_certificate(answer.certificate)
        if certificate.public_key() != key.public_key() or not answer.server_ca or not answer.device_ca:
            raise Unavailable("the answer is no certificate for this server's key")
        self._files.write(
            ServerIdentity.of(key, certificate),
            server_cas=[read_certificate(ca) for ca in answer.server_ca],
            device_cas=[read_certificate(ca) for ca in answer.device_ca],
        )

    def certify_sealing_key(self, key: PublicSealingKey, key_id: str, life_seconds: int) -> bytes:
        """The server CA's certificate, DER, for a key of this server. Raises PerfitError."""
        own, wanted = self._files.identity(), SealingKeyRequest.of(key, key_id, life_seconds)
        with self._challenged() as (servers, nonce):
            answer = _called(
                servers.CertifySealingKey,
                pb.CertifySealingKeyRequest(
                    certificate=own.certificate.public_bytes(serialization.Encoding.DER),
                    nonce=nonce,
                    signature=own.key.sign(wanted.signed(nonce), ec.ECDSA(hashes.SHA256())),
                    x25519=wanted.x25519,
                    mlkem=wanted.mlkem,
                    life_seconds=life_seconds,
                    key_id=key_id,
                ),
            )
        certificate: bytes = answer.certificate
        roots = [ca.public_bytes(serialization.Encoding.DER) for ca in self._files.server_cas()]
        found = SealingKey.from_certificate(certificate, *roots)
        if found.public.binding != key.binding or found.key_id != key_id:
            raise Unavailable("the answer is no certificate for this server's sealing key")
        return certificate

    @contextmanager
    def _challenged(self) -> Iterator[tuple[Any, bytes]]:
        """(stub of Servers, a nonce to sign). Raises PerfitError."""
        roots = b"".join(ca.public_bytes(serialization.Encoding.PEM) for ca in self._files.server_cas())
        credentials = grpc.ssl_channel_credentials(root_certificates=roots)
        with grpc.secure_channel(
            self._address, credentials, options=[("grpc.enable_http_proxy", 0)]
        ) as channel:
            enrolment: Any = services.EnrollmentStub(channel)
            yield services.ServersStub(channel), _called(enrolment.Challenge, pb.ChallengeRequest()).nonce

    def _run(self) -> None:
        seconds = _EVERY_SECONDS
        while not self._over.wait(seconds * random.uniform(0.9, 1.1)):  # noqa: S311 - no secret
            seconds = _EVERY_SECONDS if self.try_renew() else _RETRY_SECONDS

    def _end(self) -> str:
        try:
            return f"{self._files.identity().certificate.not_valid_after_utc:%Y-%m-%d %H:%M} UTC"
        except (PerfitError, OSError):
            return "nobody knows when"


def _request(key: ec.EllipticCurvePrivateKey) -> bytes:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "perfit server")])
    builder = x509.CertificateSigningRequestBuilder().subject_name(subject)
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.DER)


def _called(method: Callable[..., Any], request: Any) -> Any:
    """The answer. Raises PerfitError."""
    try:
        return method(request, timeout=_CALL_SECONDS)
    except grpc.RpcError as error:
        call: Any = error
        codes = dict(call.trailing_metadata() or ())
        raise from_code(call.code().name, codes.get("perfit-code"), str(call.details())[:200]) from None
