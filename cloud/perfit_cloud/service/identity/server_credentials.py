"""The server's certificate for gRPC, replaced at half its life without a restart."""

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
            """Called at every handshake; None: gRPC uses the one it has.

            A new one makes gRPC free the old one, which other handshakes may be using: devices that all
            reconnected after a network cut crashed the process.
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
            # Renew one that is not valid yet, too: a fast clock made it, and nobody accepts it.
            if not self._identity.starts_at <= time.time() < self._identity.renew_at:
                self._identity = self._renew()
            return self._identity
