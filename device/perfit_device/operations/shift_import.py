"""A shift from a file becomes a new version. Works offline, by what the cloud last said of its artefacts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from perfit_device.operations.operation import Emit, Operation
from perfit_device.shift_versions import PersonalShift
from perfit_shared.errors import NotFound, ShiftMismatch

if TYPE_CHECKING:
    from perfit_device.profile import Profile

__all__ = ["ImportShift", "ImportedShift"]


@dataclass(frozen=True)
class ImportedShift:
    artefact: str
    number: int  # of the new version


@dataclass(frozen=True)
class ImportShift(Operation[ImportedShift]):
    """It becomes the current version. Raises InvalidTensors, ShiftMismatch or NotFound."""

    data: bytes = field(repr=False)
    name: str = "the file"  # for messages

    def run(self, profile: Profile, emit: Emit) -> ImportedShift:
        from perfit_device import personal, shift_files
        from perfit_device.cloud_record import read_artefacts, read_record
        from perfit_device.training import update as updates
        from perfit_shared.shifts import read_metadata

        metadata = read_metadata(self.data)
        with profile.vault() as vault, vault.transaction():
            cloud_id, known = read_record(vault).cloud_id, read_artefacts(vault)
            artefact = known.get(metadata.get("artefact", ""))
            if not known:
                raise NotFound("what the cloud serves is not known yet; `perfit status` asks it")
            if artefact is None:
                raise ShiftMismatch(
                    f"{self.name} is for the artefact {metadata.get('artefact', '?')[:64]}, and the cloud "
                    f"has {', '.join(sorted(known))}"
                )
            tensors = shift_files.read(self.data, self.name, artefact)
            updates_made = max(1, shift_files.count_of(metadata, "updates", 1))
            behind = shift_files.behind_of(self.data, profile.settings, artefact.task)
            # It may know anything, also what was forgotten since, so it counts as one of before.
            shift = PersonalShift(tensors, updates_made, forgotten=0, behind=behind)
            personal.store(vault, cloud_id, artefact, shift, origin="imported")
            row = updates.update_row(cloud_id, artefact.name, artefact.task.name)
            updates.forget_checkpoint(vault, row)
            updates.forget_finished(vault, row)
            versions = personal.read_versions(vault, cloud_id, artefact.name)
        return ImportedShift(artefact.name, versions.current if versions else 0)
