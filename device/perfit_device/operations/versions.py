"""The versions of a personal shift: listing them, and going back to one. Works offline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from perfit_device import personal
from perfit_device.operations.operation import Emit, Operation
from perfit_device.shift_versions import Version, Versions
from perfit_shared.errors import NotFound

if TYPE_CHECKING:
    from perfit_device.profile import Profile
    from perfit_device.vault.store import Vault

__all__ = [
    "DropVersion",
    "Dropped",
    "ListVersions",
    "ShiftVersion",
    "ShiftVersions",
    "ShowVersion",
    "ShownVersion",
    "Undo",
]


@dataclass(frozen=True)
class ShiftVersions:
    artefact: str
    versions: Versions


@dataclass(frozen=True)
class ShiftVersion:
    artefact: str
    version: Version


@dataclass(frozen=True)
class ListVersions(Operation[ShiftVersions]):
    """Raises NotFound when there is no personal shift."""

    task: str | None = None  # name of an artefact

    def run(self, profile: Profile, emit: Emit) -> ShiftVersions:
        cloud_id, name = profile.trained(self.task)
        with profile.vault() as vault:
            versions = personal.read_versions(vault, cloud_id, name)
        if versions is None:
            raise NotFound(f"there is no personal shift for {name} yet; `perfit update` trains one")
        return ShiftVersions(name, versions)


@dataclass(frozen=True)
class Undo(Operation[ShiftVersion]):
    """The version before becomes the current one, or that of the number `to`.

    A half-done update is dropped, since it went on from the version that was current.
    """

    task: str | None = None
    to: int | None = None

    def run(self, profile: Profile, emit: Emit) -> ShiftVersion:
        from perfit_device.cloud_record import read_record
        from perfit_device.training import update as updates

        cloud_id, name = profile.trained(self.task)
        with profile.vault() as vault, vault.transaction():
            version = personal.undo(vault, cloud_id, name, self.to)
            row = updates.update_row(cloud_id, name, read_record(vault).task_of(name))
            updates.forget_checkpoint(vault, row)
            updates.forget_finished(vault, row)
        return ShiftVersion(name, version)


@dataclass(frozen=True)
class ShownVersion:
    artefact: str
    version: Version
    is_current: bool
    examples: int | None  # of the history, that it was made from; None where that is unknown
    numbers: int  # in its tensors
    norm: float  # Frobenius, over all tensors


@dataclass(frozen=True)
class ShowVersion(Operation[ShownVersion]):
    """One version, the current one where `number` is None."""

    task: str | None = None
    number: int | None = None

    def run(self, profile: Profile, emit: Emit) -> ShownVersion:
        cloud_id, name = profile.trained(self.task)
        with profile.vault() as vault:
            versions = personal.read_versions(vault, cloud_id, name)
            number = self.number or (versions.current if versions else 0)
            version = versions.find(number) if versions else None
            if versions is None or version is None:
                raise personal.not_kept(name, number)
            tensors = personal.read_tensors(vault, cloud_id, name, number)
            trained = personal.read_trained(vault, personal.shift_row(cloud_id, name), number)
        return ShownVersion(
            name,
            version,
            number == versions.current,
            None if trained is None else len(trained),
            sum(array.size for _, array in tensors.named()),
            tensors.norm(),
        )


@dataclass(frozen=True)
class Dropped:
    artefact: str
    count: int


@dataclass(frozen=True)
class DropVersion(Operation[Dropped]):
    """Delete a version for good; the whole shift, with a half-done update, where `number` is None."""

    task: str | None = None
    number: int | None = None

    def run(self, profile: Profile, emit: Emit) -> Dropped:
        cloud_id, name = profile.trained(self.task)
        with profile.vault() as vault, vault.transaction():
            if self.number is None:
                _forget_records(vault, cloud_id, name)
            return Dropped(name, personal.drop(vault, cloud_id, name, self.number))


def _forget_records(vault: Vault, cloud_id: str, name: str) -> None:
    """What is known of a shift by the numbers of its versions, which begin anew; and its half-done update."""
    from perfit_device.cloud_record import read_record
    from perfit_device.training import update as updates

    row = updates.update_row(cloud_id, name, read_record(vault).task_of(name))
    updates.forget_checkpoint(vault, row)
    updates.forget_finished(vault, row)
    for kind, of in (("measured", row), ("influence", row), ("seed", personal.shift_row(cloud_id, name))):
        vault.delete(kind, of)
