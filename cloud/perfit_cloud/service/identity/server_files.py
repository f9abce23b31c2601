"""What a server without the role enrolment keeps in its state folder.

server.pem       its own key and certificate, 0600
server_ca.crt    roots of the cloud's servers: whom it asks for the next certificate
device_ca.crt    roots of devices' certificates
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import serialization

from perfit_cloud.service.identity.server_identity import ServerIdentity
from perfit_cloud.service.state_folder import DEVICE_CA_CERTIFICATE, SERVER_CA_CERTIFICATE, SERVER_IDENTITY
from perfit_shared.errors import ConfigError
from perfit_shared.files import write_whole

__all__ = ["ServerFiles"]


class ServerFiles:
    """Thread-safe. What another process wrote is read anew; while the folder is away, what was read holds."""

    def __init__(self, folder: Path, *, trusts_group: bool = False) -> None:
        self._folder, self._trusts_group = folder, trusts_group
        self._lock = threading.Lock()
        self._read: dict[str, tuple[tuple[int, int], tuple[x509.Certificate, ...]]] = {}

    def identity(self) -> ServerIdentity:
        """Raises ConfigError when the file is missing, damaged, or readable by others."""
        return ServerIdentity.load(self._folder / SERVER_IDENTITY, trusts_group=self._trusts_group)

    def is_current(self, identity: ServerIdentity) -> bool:
        """Whether the authority that signs now signed it, as far as these files know."""
        return self.server_cas()[0].subject == identity.certificate.issuer

    def server_cas(self) -> tuple[x509.Certificate, ...]:
        """The one that signs first. Raises ConfigError."""
        return self._certificates(SERVER_CA_CERTIFICATE)

    def device_cas(self) -> tuple[x509.Certificate, ...]:
        """Raises ConfigError."""
        return self._certificates(DEVICE_CA_CERTIFICATE)

    def _certificates(self, name: str) -> tuple[x509.Certificate, ...]:
        path = self._folder / name
        try:
            stat = path.stat()
            stamp = (stat.st_ino, stat.st_mtime_ns)
            with self._lock:
                known = self._read.get(name)
                if known is None or known[0] != stamp:
                    certificates = tuple(x509.load_pem_x509_certificates(path.read_bytes()))
                    known = self._read[name] = (stamp, certificates)
                return known[1]
        except OSError as error:
            with self._lock:
                known = self._read.get(name)
            if known is not None:
                return known[1]
            raise ConfigError(f"cannot use {path}: {error.strerror}") from error
        except ValueError as error:
            raise ConfigError(f"cannot use {path}: it is damaged") from error

    def write(
        self,
        identity: ServerIdentity,
        *,
        server_cas: Iterable[x509.Certificate],
        device_cas: Iterable[x509.Certificate],
    ) -> None:
        """Roots first: whoever is cut off between two files trusts more, and never less. Raises OSError."""
        for name, certificates in ((DEVICE_CA_CERTIFICATE, device_cas), (SERVER_CA_CERTIFICATE, server_cas)):
            data = b"".join(ca.public_bytes(serialization.Encoding.PEM) for ca in certificates)
            write_whole(self._folder / name, data, mode=0o600)
        write_whole(self._folder / SERVER_IDENTITY, identity.key_pem + identity.certificate_pem, mode=0o600)
