"""Personal shifts in the vault: one for each (cloud, artefact), and their files outside it.

Beside the current version lies the one before it, so that an update can be undone.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from perfit_device.cloud.codec import Artefact
from perfit_device.vault.store import Vault
from perfit_shared.errors import (
    InvalidData,
    InvalidInput,
    InvalidTensors,
    NotFound,
    ShiftMismatch,
    VaultDamaged,
)
from perfit_shared.shifts import ShiftTensors, read_metadata

__all__ = [
    "PersonalShift",
    "artefacts",
    "export",
    "has_previous",
    "load",
    "read_file",
    "row_name",
    "store",
    "summary",
    "undo",
]

_KIND, _PREVIOUS = "shift", "previous"
_EXPORTED = ("artefact", "version", "task")  # of the metadata
_LARGEST_FILE = 512 * 1024 * 1024  # bytes


@dataclass(frozen=True)
class PersonalShift:
    """The current version of a user's shift, and how many updates made it."""

    tensors: ShiftTensors
    updates: int
    # How often examples of its task had been forgotten (`history.forgotten`) before it, or the shift
    # that it goes on from, began at the seed. What was forgotten since, it may know.
    forgotten: int = 0


def row_name(cloud_id: str, artefact: str) -> str:
    """The name under which the vault keeps what belongs to one (cloud, artefact)."""
    return f"{cloud_id}/{artefact}"


def load(vault: Vault, cloud_id: str, artefact: Artefact) -> PersonalShift | None:
    """None when this user has none yet. Raises ShiftMismatch when the artefact has changed since."""
    data = vault.get(_KIND, row_name(cloud_id, artefact.name))
    if data is None:
        return None
    metadata = read_metadata(data)
    _check_metadata(metadata, artefact, "your personal shift", "`perfit update --fresh` trains a new one")
    tensors = ShiftTensors.from_bytes(data, artefact.spec, artefact.spec.personal_rank)
    return PersonalShift(tensors, int(metadata.get("updates", "0")), int(metadata.get("forgotten", "0")))


def store(vault: Vault, cloud_id: str, artefact: Artefact, shift: PersonalShift) -> None:
    """Make it the current version. The one before is kept, unless it may know what this one does not.

    For a shift that was trained afresh, after examples were forgotten, is there to unlearn them.
    """
    place = row_name(cloud_id, artefact.name)
    metadata = _metadata(artefact) | {"updates": str(shift.updates), "forgotten": str(shift.forgotten)}
    before = vault.get(_KIND, place)
    with vault.transaction():
        _forget_previous(vault, place)
        if before is not None and int(read_metadata(before).get("forgotten", "0")) >= shift.forgotten:
            vault.put(_PREVIOUS, f"{place}/{artefact.task.name}", before)
        vault.put(_KIND, place, shift.tensors.to_bytes(metadata=metadata))


def has_previous(vault: Vault, cloud_id: str, artefact: str) -> bool:
    return bool(_previous_names(vault, row_name(cloud_id, artefact)))


def undo(vault: Vault, cloud_id: str, artefact: str) -> int:
    """Make the version before the current one, and the current one the one before: again, and it is back.

    Gives how many updates made it. Raises NotFound when there is none.
    """
    place = row_name(cloud_id, artefact)
    names = _previous_names(vault, place)
    before, current = (vault.get(_PREVIOUS, names[0]) if names else None), vault.get(_KIND, place)
    if before is None or current is None:
        raise NotFound(f"there is no earlier version of your shift for {artefact} to go back to")
    with vault.transaction():
        vault.put(_KIND, place, before)
        vault.put(_PREVIOUS, names[0], current)
    return int(read_metadata(before).get("updates", "0"))


def _previous_names(vault: Vault, place: str) -> list[str]:
    """Rows of the version before. Their names end in the task, by which `forget` finds them."""
    return [name for name in vault.list(_PREVIOUS) if name.rpartition("/")[0] == place]


def _forget_previous(vault: Vault, place: str) -> None:
    for name in _previous_names(vault, place):
        vault.delete(_PREVIOUS, name)


def artefacts(vault: Vault, cloud_id: str) -> list[str]:
    """The artefacts of a cloud that this user has a shift for; of all clouds' where `cloud_id` is ""."""
    names = [name.rpartition("/") for name in vault.list(_KIND)]
    return sorted(artefact for cloud, _, artefact in names if cloud_id in ("", cloud))


def summary(vault: Vault, cloud_id: str, artefact: str) -> dict[str, str] | None:
    """The metadata of the current version (artefact, version, task, updates), or None."""
    data = vault.get(_KIND, row_name(cloud_id, artefact))
    return None if data is None else read_metadata(data)


def export(vault: Vault, cloud_id: str, artefact: str, path: Path, *, force: bool = False) -> dict[str, str]:
    """Write a shift file, for its owner's eyes only; the metadata that it has.

    Raises NotFound when there is no shift, InvalidInput when the file exists or cannot be written.
    """
    sealed = vault.get(_KIND, row_name(cloud_id, artefact))
    if sealed is None:
        raise NotFound(f"there is no personal shift for {artefact} yet; `perfit update` trains one")
    metadata = {k: v for k, v in read_metadata(sealed).items() if k in _EXPORTED}
    data = _tensors(sealed).to_bytes(metadata=metadata)
    _write(path, data, force=force)
    return metadata


def _tensors(sealed: bytes) -> ShiftTensors:
    """Whatever spec they were made for. Raises VaultDamaged."""
    import safetensors
    import safetensors.numpy

    try:
        return ShiftTensors.from_named(safetensors.numpy.load(sealed))
    except (InvalidTensors, safetensors.SafetensorError) as error:
        raise VaultDamaged("the vault holds a shift that cannot be read") from error


def _write(path: Path, data: bytes, *, force: bool) -> None:
    target = path if not force else path.with_name(f"{path.name}.{os.getpid()}.new")
    try:
        descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if force:
            target.replace(path)
    except FileExistsError as error:
        raise InvalidInput(f"{target} exists; choose another name, or --force to replace it") from error
    except OSError as error:
        if force:
            target.unlink(missing_ok=True)
        raise InvalidInput(f"cannot write {path}: {error.strerror}") from error


def read_file(path: Path, artefact: Artefact) -> ShiftTensors:
    """Somebody's exported shift. Raises InvalidData, InvalidTensors or ShiftMismatch."""
    try:
        if path.stat().st_size > _LARGEST_FILE:
            raise InvalidData(f"{path} is too large to be a shift")
        data = path.read_bytes()
    except OSError as error:
        raise InvalidData(f"{path}: cannot be read ({error.strerror})") from error
    try:
        metadata = read_metadata(data)
    except InvalidTensors as error:
        raise InvalidTensors(f"{path}: {error}") from error
    _check_metadata(metadata, artefact, str(path), "ask for one that was trained against it")
    try:
        return ShiftTensors.from_bytes(data, artefact.spec, artefact.spec.personal_rank)
    except InvalidTensors as error:
        raise ShiftMismatch(f"{path} does not fit the artefact {artefact.name}: {error}") from error


def _metadata(artefact: Artefact) -> dict[str, str]:
    return {"artefact": artefact.name, "version": artefact.version, "task": artefact.task.name}


def _check_metadata(metadata: Mapping[str, str], artefact: Artefact, whose: str, remedy: str) -> None:
    if metadata.get("artefact") != artefact.name:
        raise ShiftMismatch(
            f"{whose} is for the artefact {metadata.get('artefact', '?')[:64]}, not {artefact.name}"
        )
    if metadata.get("version") != artefact.version:
        raise ShiftMismatch(
            f"{whose} was trained against another version of {artefact.name} than the cloud serves; {remedy}"
        )
