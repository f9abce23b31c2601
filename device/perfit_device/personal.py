"""Personal shifts in the vault: one for each (cloud, artefact), and their files outside it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from perfit_device.codec import Artefact
from perfit_device.vault import Vault
from perfit_shared.errors import InvalidData, InvalidInput, InvalidTensors, ShiftMismatch
from perfit_shared.shifts import ShiftTensors, read_metadata

__all__ = ["PersonalShift", "export", "load", "place_of", "read_file", "store"]

_KIND = "shift"
_LARGEST_FILE = 512 * 1024 * 1024  # bytes


@dataclass(frozen=True)
class PersonalShift:
    """The current version of a user's shift, and how many updates made it."""

    tensors: ShiftTensors
    updates: int


def place_of(cloud_id: str, artefact: str) -> str:
    """The name under which the vault keeps what belongs to one (cloud, artefact)."""
    return f"{cloud_id}/{artefact}"


def load(vault: Vault, cloud_id: str, artefact: Artefact) -> PersonalShift | None:
    """None when this user has none yet. Raises ShiftMismatch when the artefact has changed since."""
    data = vault.get(_KIND, place_of(cloud_id, artefact.name))
    if data is None:
        return None
    metadata = read_metadata(data)
    _check_metadata(metadata, artefact, "your personal shift", "`perfit update --fresh` trains a new one")
    tensors = ShiftTensors.from_bytes(data, artefact.spec, artefact.spec.personal_rank)
    return PersonalShift(tensors, int(metadata.get("updates", "0")))


def store(vault: Vault, cloud_id: str, artefact: Artefact, shift: PersonalShift) -> None:
    """Make it the current version."""
    metadata = _metadata(artefact) | {"updates": str(shift.updates)}
    vault.put(_KIND, place_of(cloud_id, artefact.name), shift.tensors.to_bytes(metadata=metadata))


def summary(vault: Vault, cloud_id: str, artefact: str) -> dict[str, str] | None:
    """The metadata of the current version (artefact, version, task, updates), or None."""
    data = vault.get(_KIND, place_of(cloud_id, artefact))
    return None if data is None else read_metadata(data)


def export(path: Path, artefact: Artefact, shift: ShiftTensors, *, force: bool = False) -> None:
    """Write a shift file, for its owner's eyes only. Raises InvalidInput when it exists or cannot be."""
    data = shift.to_bytes(metadata=_metadata(artefact))
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


def _check_metadata(metadata: dict[str, str], artefact: Artefact, whose: str, remedy: str) -> None:
    if metadata.get("artefact") != artefact.name:
        raise ShiftMismatch(
            f"{whose} is for the artefact {metadata.get('artefact', '?')[:64]}, not {artefact.name}"
        )
    if metadata.get("version") != artefact.version:
        raise ShiftMismatch(
            f"{whose} was trained against another version of {artefact.name} than the cloud serves; {remedy}"
        )
