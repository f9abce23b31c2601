"""An authority that can be replaced: the certificate that signs, and those that are trusted beside it.

    server_ca.pem         key and certificate that sign, 0600
    server_ca.next.pem    the next key and certificate, trusted already; between `begin` and `switch`
    server_ca.last.crt    the certificate that signed before, still trusted; between `switch` and `finish`

and the same for device_ca. Every step is a file that is written whole, so that a step that was cut short is
done again.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509

from perfit_cloud.service.identity.authority_keys import FILE_KEYS, AuthorityKeys
from perfit_cloud.service.identity.certificates import CertificateAuthority
from perfit_shared.errors import ConfigError
from perfit_shared.files import write_whole

__all__ = ["AuthorityFiles", "TrustedAuthority"]


@dataclass(frozen=True)
class TrustedAuthority:
    """What signs, and what is trusted."""

    current: CertificateAuthority
    next: CertificateAuthority | None = None
    last: x509.Certificate | None = None

    @property
    def certificates(self) -> tuple[x509.Certificate, ...]:
        """All that are trusted, the one that signs first."""
        others = (self.next.certificate if self.next else None, self.last)
        return tuple(dict.fromkeys(c for c in (self.current.certificate, *others) if c is not None))

    def issued(self, certificate: x509.Certificate) -> bool:
        """Whether one that is trusted signed it, whatever its dates and revocation."""
        return any(CertificateAuthority.signed(authority, certificate) for authority in self.certificates)


class AuthorityFiles:
    """One authority in a state folder, read anew when another process changed it. Thread-safe."""

    def __init__(
        self,
        state: Path,
        name: str,
        common_name: str,
        *,
        trusts_group: bool = False,
        keys: AuthorityKeys = FILE_KEYS,
    ) -> None:
        """Makes the authority where there is none. Raises OSError, ConfigError, Busy."""
        self._common_name, self._trusts_group, self._keys = common_name, trusts_group, keys
        self._current = state / f"{name}.pem"
        self._next, self._last = state / f"{name}.next.pem", state / f"{name}.last.crt"
        self._lock = threading.Lock()
        self._open(self._current)
        self._stamp = self._stamped()
        self._known = self._read()

    def get(self) -> TrustedAuthority:
        """As the files say now. Raises OSError, ConfigError when they were damaged meanwhile."""
        with self._lock:
            stamp = self._stamped()
            # A folder that went away while we run takes nothing from what is known.
            if stamp != self._stamp and stamp[0] is not None:
                self._known, self._stamp = self._read(), stamp
            return self._known

    def begin(self) -> None:
        """Make the next authority, if there is none."""
        self._open(self._next)

    def _open(self, path: Path) -> None:
        CertificateAuthority.open(path, self._common_name, trusts_group=self._trusts_group, keys=self._keys)

    def switch(self) -> None:
        """Sign with the next one from now on; the key that signed before is gone. Harmless twice."""
        if self._next.exists():
            write_whole(self._last, self._read().current.pem, mode=0o600)
            before = self._current.read_bytes()
            self._next.replace(self._current)
            self._keys.delete(before)

    def finish(self) -> None:
        """Trust the last one no more. Harmless when there is none."""
        self._last.unlink(missing_ok=True)

    def _read(self) -> TrustedAuthority:
        def load(path: Path) -> CertificateAuthority:
            return CertificateAuthority.load(path, trusts_group=self._trusts_group, keys=self._keys)

        try:
            last = x509.load_pem_x509_certificate(self._last.read_bytes()) if self._last.exists() else None
        except ValueError as error:
            raise ConfigError(f"{self._last} is damaged; restore it from a backup") from error
        current = load(self._current)
        return TrustedAuthority(current, load(self._next) if self._next.exists() else None, last)

    def _stamped(self) -> tuple[object, ...]:
        def of(path: Path) -> object:
            try:
                stat = path.stat()
            except FileNotFoundError:
                return None
            return stat.st_ino, stat.st_mtime_ns, stat.st_size

        return tuple(of(path) for path in (self._current, self._next, self._last))
