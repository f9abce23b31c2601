"""Shift files: a personal shift outside the vault, unsealed, for its owner to keep or to give away."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from perfit_device import personal
from perfit_shared.errors import InvalidData, InvalidInput, InvalidTensors, NotFound, ShiftMismatch
from perfit_shared.files import write_whole

if TYPE_CHECKING:
    from perfit_device.cloud.codec import Artefact
    from perfit_device.settings import DeviceSettings
    from perfit_device.vault.store import Vault
    from perfit_shared.shifts import ShiftTensors
    from perfit_shared.tasks import Task

__all__ = ["behind_of", "count_of", "export", "read", "read_bytes", "write"]

_LARGEST_FILE = 256 * 1024 * 1024  # bytes
_DIGITS = 7


def export(vault: Vault, cloud_id: str, artefact: str) -> tuple[bytes, str]:
    """What a file of the current version holds, and the artefact's version. Raises NotFound."""
    versions = personal.read_versions(vault, cloud_id, artefact)
    if versions is None:
        raise NotFound(f"there is no personal shift for {artefact} yet; `perfit update` trains one")
    version = versions.now.artefact_version
    metadata = {"artefact": artefact, "version": version, "task": versions.task}
    metadata["updates"] = str(versions.now.updates)
    if versions.now.behind:
        metadata["behind"] = str(versions.now.behind)
    tensors = personal.read_tensors(vault, cloud_id, artefact, versions.current)
    return tensors.to_bytes(metadata=metadata), version


def write(path: Path, data: bytes, *, force: bool) -> None:
    """For its owner's eyes only. Raises InvalidInput when the file exists or cannot be written."""
    if not force and os.path.lexists(path):
        raise InvalidInput(f"{path} exists; choose another name, or --force to replace it")
    try:
        write_whole(path, data, mode=0o600)
    except OSError as error:
        raise InvalidInput(f"cannot write {path}: {error.strerror}") from error


def read_bytes(path: Path) -> bytes:
    """Raises InvalidData."""
    try:
        if path.stat().st_size > _LARGEST_FILE:
            raise InvalidData(f"{path} is too large to be a shift")
        return path.read_bytes()
    except OSError as error:
        raise InvalidData(f"{path}: cannot be read ({error.strerror})") from error


def count_of(metadata: Mapping[str, str], name: str, default: int) -> int:
    """A small number that a file gives; `default` where it gives none."""
    text = metadata.get(name, "")
    return int(text) if text.isascii() and text.isdigit() and len(text) < _DIGITS else default


def behind_of(data: bytes, settings: DeviceSettings, task: Task) -> int:
    """How many examples it was trained behind, but no more than the task or the config file has.

    A file may not say how much of one's own text is sent.
    """
    from perfit_device.nearest import examples_of_task
    from perfit_shared.shifts import read_metadata

    return min(examples_of_task(settings, task), count_of(read_metadata(data), "behind", 0))


def read(data: bytes, name: str, artefact: Artefact) -> ShiftTensors:
    """Somebody's exported shift; `name` is the file's. Raises InvalidTensors or ShiftMismatch."""
    from perfit_shared.shifts import ShiftTensors, read_metadata

    try:
        metadata = read_metadata(data)
    except InvalidTensors as error:
        raise InvalidTensors(f"{name}: {error}") from error
    if metadata.get("artefact") != artefact.name:
        raise ShiftMismatch(
            f"{name} is for the artefact {metadata.get('artefact', '?')[:64]}, not {artefact.name}"
        )
    remedy = "ask for one that was trained against it"
    personal.check_version(metadata.get("version", ""), artefact, name, remedy)
    try:
        return ShiftTensors.from_bytes(data, artefact.spec, artefact.spec.personal_rank)
    except InvalidTensors as error:
        raise ShiftMismatch(f"{name} does not fit the artefact {artefact.name}: {error}") from error
