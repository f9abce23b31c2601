"""The versions of a personal shift: listing them, and going back to one. Works offline."""

from __future__ import annotations

from perfit_device import personal
from perfit_device.cloud_record import read_record
from perfit_device.personal import Version, Versions
from perfit_device.profile import Profile
from perfit_device.training import update as updates
from perfit_shared.errors import NotFound

__all__ = ["read", "undo"]


def read(profile: Profile, task: str | None) -> tuple[str, Versions]:
    """(artefact, its versions). Raises NotFound when there is no personal shift."""
    cloud_id, name = profile.trained(task)
    with profile.vault() as vault:
        versions = personal.read_versions(vault, cloud_id, name)
    if versions is None:
        raise NotFound(f"there is no personal shift for {name} yet; `perfit update` trains one")
    return name, versions


def undo(profile: Profile, task: str | None, to: int | None = None) -> tuple[str, Version]:
    """(artefact, the version that is current now): the one before, or that of the number `to`.

    A half-done update is dropped, since it went on from the version that was current.
    """
    cloud_id, name = profile.trained(task)
    with profile.vault() as vault, vault.transaction():
        version = personal.undo(vault, cloud_id, name, to)
        row = updates.update_row(cloud_id, name, read_record(vault).task_of(name))
        updates.forget_checkpoint(vault, row)
        updates.forget_finished(vault, row)
    return name, version
