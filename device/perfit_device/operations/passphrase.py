"""The passphrase of a profile's vault."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from perfit_device.operations.operation import Emit, Operation
from perfit_shared.errors import ConfigError

if TYPE_CHECKING:
    from perfit_device.profile import Profile

__all__ = ["ChangePassphrase", "VaultLock"]


@dataclass(frozen=True)
class VaultLock(Operation[str]):
    """What locks the vault: "passphrase" or "keyring"."""

    def run(self, profile: Profile, emit: Emit) -> str:
        with profile.vault() as vault:
            return vault.lock


@dataclass(frozen=True)
class ChangePassphrase(Operation[None]):
    """`old` is None where the keyring locks the vault. Raises WrongPassphrase."""

    old: str | None
    new: str

    def run(self, profile: Profile, emit: Emit) -> None:
        if self.new == self.old:
            raise ConfigError("the new passphrase is the old one; choose another")
        with profile.vault() as vault:
            vault.check_passphrase(self.old)
            vault.change_passphrase(self.new)
