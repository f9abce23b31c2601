"""A personal shift for outside the vault."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from perfit_device.operations.operation import Emit, Operation

if TYPE_CHECKING:
    from perfit_device.profile import Profile

__all__ = ["ExportShift", "ExportedShift"]


@dataclass(frozen=True)
class ExportedShift:
    artefact: str
    version: str  # of the artefact that it was trained against
    data: bytes  # of a file, not sealed


@dataclass(frozen=True)
class ExportShift(Operation[ExportedShift]):
    """The current version. Works offline. Raises NotFound when there is no personal shift."""

    task: str | None = None

    def run(self, profile: Profile, emit: Emit) -> ExportedShift:
        from perfit_device import shift_files

        with profile.vault() as vault:
            cloud_id, name = profile.trained(self.task)
            data, version = shift_files.export(vault, cloud_id, name)
        return ExportedShift(name, version, data)
