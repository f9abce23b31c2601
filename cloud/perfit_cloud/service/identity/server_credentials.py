"""The server's certificate towards gRPC, replaced at half its life without a restart."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import grpc

from perfit_cloud.service.identity.authenticator import ServerIdentity

__all__ = ["ServerCredentials"]


class ServerCredentials:
    def __init__(self, renew: Callable[[], ServerIdentity]) -> None:
        """`renew` issues the next certificate, or reads what another process issued."""
        self._renew = renew
        self._lock = threading.Lock()
        self._identity = renew()

    def credentials(self, client_ca: bytes | None) -> grpc.ServerCredentials:
        """With `client_ca`, callers must show a certificate that it issued."""

        given = self._current()

        def configuration() -> grpc.ServerCertificateConfiguration:
            return grpc.ssl_server_certificate_configuration(
                [(given.key_pem, given.certificate_pem)], root_certificates=client_ca
            )

        def renewed() -> grpc.ServerCertificateConfiguration | None:
            """Asked at every handshake; None: the one that gRPC has.

            When gRPC is given one, it frees what it has, and other handshakes of that moment may be using
            it: devices that came back together after a cut ended the process.
            """
            nonlocal given
            current = self._current()
            if current == given:
                return None
            given = current
            return configuration()

        return grpc.dynamic_ssl_server_credentials(
            configuration(),
            renewed,  # type: ignore[arg-type]  # the stubs do not know of the documented None
            require_client_authentication=client_ca is not None,
        )

    def ends_at(self) -> float:
        """Unix seconds."""
        return self._identity.ends_at

    def _current(self) -> ServerIdentity:
        with self._lock:
            # Before its time too: it was made while the clock was ahead, and nobody takes it now.
            if not self._identity.starts_at <= time.time() < self._identity.renew_at:
                self._identity = self._renew()
            return self._identity
