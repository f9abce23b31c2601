"""Where a profile lives and what the environment says. The environment is read here alone."""

from __future__ import annotations

import contextlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

from perfit_shared.errors import ConfigError
from perfit_shared.grpc_environment import prepare_grpc

__all__ = ["Settings", "prepare_process"]

_PROFILE = re.compile(r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")


@dataclass(frozen=True)
class Settings:
    """Raises ConfigError when the profile's name cannot be a folder's."""

    profile: str = "default"
    home: Path = Path("~/.perfit")

    def __post_init__(self) -> None:
        if not _PROFILE.match(self.profile):
            raise ConfigError("a profile's name should be letters, digits, dots, dashes or underscores")

    @classmethod
    def from_environment(cls, profile: str | None) -> Settings:
        home = os.environ.get("PERFIT_HOME") or "~/.perfit"
        return cls(profile=profile or "default", home=Path(home).expanduser())

    @property
    def vault_path(self) -> Path:
        return self.home / "profiles" / self.profile / "vault.db"

    def passphrase(self) -> str | None:
        """PERFIT_PASSPHRASE, or None."""
        return os.environ.get("PERFIT_PASSPHRASE") or None

    def new_passphrase(self) -> str | None:
        """PERFIT_NEW_PASSPHRASE, or None: for `perfit passphrase` in scripts."""
        return os.environ.get("PERFIT_NEW_PASSPHRASE") or None


def prepare_process() -> None:
    """No core dumps, which would hold keys; and settings of libraries that must stand before they are
    imported, where what the user set stays."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource  # not on Windows

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    prepare_grpc()
    # The largest matrix here is 32 × 4096: threads cost more memory than they save time.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
