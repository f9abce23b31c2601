"""Shift files: a personal shift outside the vault, unsealed, for its owner to keep or to give away."""

from __future__ import annotations

import os
from pathlib import Path

from perfit_device import personal
from perfit_device.cloud.codec import Artefact
from perfit_device.vault.store import Vault
from perfit_shared.errors import InvalidData, InvalidInput, InvalidTensors, NotFound, ShiftMismatch
from perfit_shared.files import write_whole
from perfit_shared.shifts import ShiftTensors, read_metadata

__all__ = ["export", "read_file"]

_LARGEST_FILE = 512 * 1024 * 1024  # bytes


def export(vault: Vault, cloud_id: str, artefact: str, path: Path, *, force: bool = False) -> dict[str, str]:
    """Write the current version to a file, for its owner's eyes only; the metadata that the file has.

    Raises NotFound when there is no shift, InvalidInput when the file exists or cannot be written.
    """
    versions = personal.read_versions(vault, cloud_id, artefact)
    if versions is None:
        raise NotFound(f"there is no personal shift for {artefact} yet; `perfit update` trains one")
    metadata = {"artefact": artefact, "version": versions.now.artefact_version, "task": versions.task}
    tensors = personal.read_tensors(vault, cloud_id, artefact, versions.current)
    _write(path, tensors.to_bytes(metadata=metadata), force=force)
    return metadata


def _write(path: Path, data: bytes, *, force: bool) -> None:
    if not force and os.path.lexists(path):
        raise InvalidInput(f"{path} exists; choose another name, or --force to replace it")
    try:
        write_whole(path, data, mode=0o600)
    except OSError as error:
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
    if metadata.get("artefact") != artefact.name:
        raise ShiftMismatch(
            f"{path} is for the artefact {metadata.get('artefact', '?')[:64]}, not {artefact.name}"
        )
    remedy = "ask for one that was trained against it"
    personal.check_version(metadata.get("version", ""), artefact, str(path), remedy)
    try:
        return ShiftTensors.from_bytes(data, artefact.spec, artefact.spec.personal_rank)
    except InvalidTensors as error:
        raise ShiftMismatch(f"{path} does not fit the artefact {artefact.name}: {error}") from error
