"""Vaults of earlier formats, brought to today's; `Vault.open` does it, in one transaction.

Format 1 stored the current version of a shift as a row "shift" named CLOUD/ARTEFACT, and the one before as
a row "previous" named CLOUD/ARTEFACT/TASK. Both were safetensors whose metadata said what they were.
Format 2 keeps the last ten versions, as `personal` describes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from perfit_shared.errors import InvalidTensors, VaultDamaged

if TYPE_CHECKING:
    from perfit_device.vault.store import Vault

__all__ = ["migrate"]


def migrate(vault: Vault, number: int) -> None:
    """Rewrite the rows of a vault of format `number`. Raises VaultDamaged."""
    if number == 1:
        _from_1_to_2(vault)


def _from_1_to_2(vault: Vault) -> None:
    from perfit_device.personal import add
    from perfit_device.shift_versions import Version
    from perfit_shared.shifts import read_metadata

    earlier = {name.rpartition("/")[0]: data for name, data in vault.list("previous").items()}
    for name in vault.list("previous"):
        vault.delete("previous", name)
    for row, current in vault.list("shift").items():
        vault.delete("shift", row)
        versions, task = [], ""
        for number, data in enumerate([earlier[row], current] if row in earlier else [current], start=1):
            try:
                metadata = read_metadata(data)
            except InvalidTensors as error:
                raise VaultDamaged("the vault holds a shift that cannot be read") from error
            updates, forgotten = (int(metadata.get(key, "0")) for key in ("updates", "forgotten"))
            version = Version(number, metadata.get("version", ""), updates, forgotten, follows=number - 1)
            versions.append((version, data, None))
            task = metadata.get("task", row.rpartition("/")[2])
        add(vault, row, task, versions, len(versions))
