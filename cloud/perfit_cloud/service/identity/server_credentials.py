"""The server's certificate for gRPC, replaced at half its life, or with its authority, without a restart."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import grpc

from perfit_cloud.service.identity.server_identity import ServerIdentity
from perfit_shared.errors import PerfitError

__all__ = ["ServerCredentials"]


class ServerCredentials:
    def __init__(
        self, renew: Callable[[], ServerIdentity], is_current: Callable[[ServerIdentity], bool]
    ) -> None:
        """`renew` issues the next certificate, or reads what another process issued.

        `is_current`: whether the authority that signs now signed this one; asked at every handshake.
        """
        self._renew, self._is_current = renew, is_current
        self._lock = threading.Lock()
        self._identity = renew()

    def credentials(self, client_cas: Callable[[], bytes] | None) -> grpc.ServerCredentials:
        """With `client_cas`, callers must show a certificate that one of these roots (PEM) issued.

        Roots that change hold from the next handshake on.
        """

        def now() -> tuple[ServerIdentity, bytes | None]:
            return self._current(), None if client_cas is None else client_cas()

        given = now()

        def configuration() -> grpc.ServerCertificateConfiguration:
            identity, roots = given
            return grpc.ssl_server_certificate_configuration(
                [(identity.key_pem, identity.certificate_pem)], root_certificates=roots
            )

        def renewed() -> grpc.ServerCertificateConfiguration | None:
            """Called at every handshake; None: gRPC uses the one it has.

            A new one makes gRPC free the old one, which other handshakes may be using: devices that all
            reconnected after a network cut crashed the process.
            """
            nonlocal given
            current = now()
            if current == given:
                return None
            given = current
            return configuration()

        return grpc.dynamic_ssl_server_credentials(
            configuration(),
            renewed,  # type: ignore[arg-type]  # the stubs do not know of the documented None
            require_client_authentication=client_cas is not None,
        )

    def ends_at(self) -> float:
        """Of the certificate that the next caller would be shown; unix seconds.

        So a server that nobody calls renews its own when it is asked. It would seem to run out otherwise.
        """
        try:
            return self._current().ends_at
        except PerfitError:
            return self._identity.ends_at

    def _current(self) -> ServerIdentity:
        with self._lock:
            # Renew one that is not valid yet, too: a fast clock made it, and nobody accepts it.
            is_due = not self._identity.starts_at <= time.time() < self._identity.renew_at
            if is_due or not self._is_current(self._identity):
                self._identity = self._renew()
            return self._identity
