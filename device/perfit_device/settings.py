"""Where a profile lives and what the environment says. The environment is read here alone."""

from __future__ import annotations

import contextlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

from perfit_shared.errors import ConfigError
from perfit_shared.grpc_environment import prepare_grpc
from perfit_shared.terminal import utf8

__all__ = ["DeviceSettings", "prepare_process"]

_PROFILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


@dataclass(frozen=True)
class DeviceSettings:
    """Raises ConfigError when the profile's name cannot be a folder's."""

    profile: str = "default"
    home: Path = Path("~/.perfit")

    def __post_init__(self) -> None:
        if not _PROFILE.fullmatch(self.profile):
            raise ConfigError("a profile's name should be letters, digits, dots, dashes or underscores")

    @classmethod
    def from_environment(cls, profile: str | None) -> DeviceSettings:
        """The profile named, else PERFIT_PROFILE's, else "default"."""
        home = Path(os.environ.get("PERFIT_HOME") or "~/.perfit")
        with contextlib.suppress(RuntimeError):  # without a known home "~" is a folder's name
            home = home.expanduser()
        return cls(profile=profile or os.environ.get("PERFIT_PROFILE") or "default", home=home)

    @property
    def vault_path(self) -> Path:
        return self._vault_of(self.profile)

    def profiles(self) -> list[str]:
        """The names of all profiles that have a vault, sorted."""
        folder = self.home / "profiles"
        names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
        return sorted(n for n in names if _PROFILE.fullmatch(n) and self._vault_of(n).is_file())

    def _vault_of(self, profile: str) -> Path:
        return self.home / "profiles" / profile / "vault.db"

    @property
    def costly_vault(self) -> bool:
        """PERFIT_COSTLY_VAULT: whether a vault may be opened whose key costs more than perfit's own."""
        return os.environ.get("PERFIT_COSTLY_VAULT", "") not in ("", "0")

    def passphrase(self) -> str | None:
        """PERFIT_PASSPHRASE, or None. Raises InvalidInput when it is no text."""
        return _secret("PERFIT_PASSPHRASE")

    def new_passphrase(self) -> str | None:
        """PERFIT_NEW_PASSPHRASE, or None: for `perfit passphrase` in scripts."""
        return _secret("PERFIT_NEW_PASSPHRASE")


def _secret(name: str) -> str | None:
    """A line break alone, as an empty file gives it, is none."""
    value = utf8(os.environ.get(name, ""), name)
    return value if value.strip("\r\n") else None


def prepare_process() -> None:
    """No core dumps, which would hold keys; and settings of libraries that must stand before they are
    imported, where what the user set stays."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource  # not on Windows

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    prepare_grpc()
    # The largest matrix here is 32 × 4096: threads cost more memory than they save time.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
