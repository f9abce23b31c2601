"""Personal shifts in the vault: for each (cloud, artefact) the last versions, one of which is current.

    shift    CLOUD/ARTEFACT           JSON: which version is current, and what is known of each
    version  CLOUD/ARTEFACT/NUMBER    the tensors of one version
    trained  CLOUD/ARTEFACT/NUMBER    what it was made from: 16 bytes of each example's name

An update adds a version that follows the current one, and `undo` goes back to the one that it follows.
Of more than ten the oldest go, but never the current one and the one before it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from perfit_device.shift_versions import PersonalShift, Version, Versions
from perfit_shared.errors import InvalidInput, InvalidTensors, NotFound, ShiftMismatch, VaultDamaged

if TYPE_CHECKING:
    from perfit_device.cloud.codec import Artefact
    from perfit_device.vault.store import Vault
    from perfit_shared.shifts import ShiftTensors

__all__ = [
    "MOST_VERSIONS",
    "add",
    "artefacts",
    "check_version",
    "digest",
    "drop",
    "forget_examples",
    "knowing",
    "load",
    "marks_from",
    "marks_of",
    "not_kept",
    "read_tensors",
    "read_trained",
    "read_versions",
    "shift_row",
    "store",
    "undo",
]

MOST_VERSIONS = 10  # kept of one shift, the current one among them
_INDEX, _TENSORS, _TRAINED = "shift", "version", "trained"  # kinds of rows
_MARK_BYTES = 16  # of an example's name, which is a sha-256


def shift_row(cloud_id: str, artefact: str) -> str:
    """The name under which the vault keeps what belongs to one (cloud, artefact)."""
    return f"{cloud_id}/{artefact}"


def artefacts(vault: Vault, cloud_id: str = "") -> list[str]:
    """The artefacts of a cloud that this user has a shift for; of all clouds' where `cloud_id` is ""."""
    names = [name.rpartition("/") for name in vault.list(_INDEX)]
    return sorted(artefact for cloud, _, artefact in names if cloud_id in ("", cloud))


def read_versions(vault: Vault, cloud_id: str, artefact: str) -> Versions | None:
    """None when this user has no shift for the artefact. Raises VaultDamaged."""
    data = vault.get(_INDEX, shift_row(cloud_id, artefact))
    return None if data is None else Versions.from_bytes(data)


def digest(vault: Vault, cloud_id: str, artefact: str) -> bytes | None:
    """Of what says which version is current: another one after every change. None where there is none."""
    return vault.digest(_INDEX, shift_row(cloud_id, artefact))


def load(vault: Vault, cloud_id: str, artefact: Artefact) -> PersonalShift | None:
    """None when this user has none yet. Raises ShiftMismatch when the artefact has changed since."""
    from perfit_shared.shifts import ShiftTensors

    versions = read_versions(vault, cloud_id, artefact.name)
    if versions is None:
        return None
    now = versions.now
    check_version(now.artefact_version, artefact, "your personal shift", "`perfit migrate` trains a new one")
    row = shift_row(cloud_id, artefact.name)
    data = _read(vault, row, now.number)
    tensors = ShiftTensors.from_bytes(data, artefact.spec, artefact.spec.personal_rank)
    trained = read_trained(vault, row, now.number)
    return PersonalShift(tensors, now.updates, now.forgotten, now.learned, trained, now.behind)


def read_trained(vault: Vault, row: str, number: int) -> frozenset[bytes] | None:
    """Marks (`marks_of`) of the examples that a version was made from; None where that is unknown."""
    data = vault.get(_TRAINED, f"{row}/{number}")
    return None if data is None else marks_from(data)


def marks_from(data: bytes) -> frozenset[bytes]:
    return frozenset(data[at : at + _MARK_BYTES] for at in range(0, len(data), _MARK_BYTES))


def marks_of(names: Iterable[str]) -> frozenset[bytes]:
    """What stands for examples in the record of a version."""
    return frozenset(bytes.fromhex(name)[:_MARK_BYTES] for name in names)


def read_tensors(vault: Vault, cloud_id: str, artefact: str, number: int) -> ShiftTensors:
    """The tensors of one version, whatever spec they were made for. Raises VaultDamaged."""
    import safetensors
    import safetensors.numpy

    from perfit_shared.shifts import ShiftTensors

    data = _read(vault, shift_row(cloud_id, artefact), number)
    try:
        return ShiftTensors.from_named(safetensors.numpy.load(data))
    except (InvalidTensors, safetensors.SafetensorError) as error:
        raise VaultDamaged("the vault holds a shift that cannot be read") from error


def store(vault: Vault, cloud_id: str, artefact: Artefact, shift: PersonalShift, *, origin: str = "") -> None:
    """Add a version that follows the current one, and make it current.

    It removes the oldest of more than ten, but not the one before. It also removes versions that may
    remember what this one does not: a shift trained afresh after examples were forgotten is there to
    unlearn them.
    """
    row = shift_row(cloud_id, artefact.name)
    old = read_versions(vault, cloud_id, artefact.name)
    kept = () if old is None else old.kept
    version = Version(
        number=1 + max((each.number for each in kept), default=0),
        artefact_version=artefact.version,
        updates=shift.updates,
        forgotten=shift.forgotten,
        date=f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}",
        learned=shift.learned,
        follows=0 if old is None else old.current,
        origin=origin,
        behind=shift.behind,
    )
    others = [each for each in kept if each.forgotten >= shift.forgotten]
    spare = sorted(
        (each for each in others if each.number != version.follows), key=lambda v: (v.date, v.number)
    )
    excess = {each.number for each in spare[: max(0, len(others) + 1 - MOST_VERSIONS)]}
    others = [each for each in others if each.number not in excess]
    new = Versions(artefact.task.name, version.number, (*others, version))
    with vault.transaction():
        _write(vault, row, old, new)
        _put(vault, row, version.number, shift.tensors.to_bytes(), shift.trained)


def add(
    vault: Vault,
    row: str,
    task: str,
    more: Sequence[tuple[Version, bytes, frozenset[bytes] | None]],
    current: int,
) -> tuple[int, ...]:
    """Keep these (version, tensors, what it was made from) beside those that are there; their numbers.

    Where the shift has no version yet, they keep their numbers, and `current` is the current one. Else the
    current one stays.
    """
    data = vault.get(_INDEX, row)
    old = None if data is None else Versions.from_bytes(data)
    first = 0 if old is None else max(version.number for version in old.kept)
    new_numbers = {
        version.number: version.number if old is None else first + at
        for at, (version, _, _) in enumerate(more, start=1)
    }
    versions = [
        replace(version, number=new_numbers[version.number], follows=new_numbers.get(version.follows, 0))
        for version, _, _ in more
    ]
    with vault.transaction():
        kept = (*(old.kept if old else ()), *versions)
        _write(vault, row, old, Versions(task, old.current if old else new_numbers[current], kept))
        for version, (_, tensors, trained) in zip(versions, more, strict=True):
            _put(vault, row, version.number, tensors, trained)
    return tuple(version.number for version in versions)


def undo(vault: Vault, cloud_id: str, artefact: str, to: int | None = None) -> Version:
    """Make the version before the current one current, or that of the number `to`, which may be a later one.

    Raises NotFound when there is none, InvalidInput when it is the current one.
    """
    versions = read_versions(vault, cloud_id, artefact)
    if versions is None:
        raise NotFound(f"there is no personal shift for {artefact} yet; `perfit update` trains one")
    if to == versions.current:
        raise InvalidInput(f"version {to} of {artefact} is the current one already")
    version = versions.before if to is None else versions.find(to)
    if version is None and to is not None:
        raise not_kept(artefact, to)
    if version is None:
        raise NotFound(f"there is no earlier version of your shift for {artefact} to go back to")
    _write(vault, shift_row(cloud_id, artefact), versions, replace(versions, current=version.number))
    return version


def not_kept(artefact: str, number: int) -> NotFound:
    return NotFound(f"version {number} of {artefact} is not kept; `perfit versions list` shows the others")


def drop(vault: Vault, cloud_id: str, artefact: str, number: int | None) -> int:
    """Delete a version for good, or the whole shift where it is None; how many versions went.

    Raises NotFound, and InvalidInput for the current one.
    """
    row, versions = shift_row(cloud_id, artefact), read_versions(vault, cloud_id, artefact)
    if versions is None or (number is not None and versions.find(number) is None):
        raise not_kept(artefact, number or 0)
    if number == versions.current:
        raise InvalidInput(
            f"version {number} of {artefact} is the current one; `perfit versions use` another first, or "
            "--all drops the whole shift"
        )
    with vault.transaction():
        if number is not None:
            kept = tuple(version for version in versions.kept if version.number != number)
            _write(vault, row, versions, replace(versions, kept=kept))
            return 1
        for kind in (_TENSORS, _TRAINED):
            for each in versions.kept:
                vault.delete(kind, f"{row}/{each.number}")
        vault.delete(_INDEX, row)
        return len(versions.kept)


def knowing(vault: Vault, tasks: Collection[str], names: Iterable[str]) -> list[tuple[str, Version, bool]]:
    """(row, version, whether it is certain) of those that were made from one of these examples."""
    marks, found = marks_of(names), []
    for row, versions in _all(vault).items():
        for version in versions.kept if versions.task in tasks else ():
            trained = read_trained(vault, row, version.number)
            if trained is None or not trained.isdisjoint(marks):
                found.append((row, version, trained is not None))
    return found


def forget_examples(vault: Vault, tasks: Collection[str], names: Collection[str], count: int) -> None:
    """Delete the versions that may know these examples for good, but for the current ones.

    `count` is the value of `history.forgotten` from now on. What knows none of them keeps its way back.
    """
    marks = marks_of(names)
    knows = {(row, version.number) for row, version, _ in knowing(vault, tasks, names)}
    for row, versions in _all(vault).items():
        if versions.task not in tasks:
            continue
        kept = [
            version if (row, version.number) in knows else _without_doubt(version, count)
            for version in versions.kept
            if version.number == versions.current or (row, version.number) not in knows
        ]
        _write(vault, row, versions, replace(versions, kept=tuple(kept)))
        trained = read_trained(vault, row, versions.current)
        if trained is not None and not trained.isdisjoint(marks):  # they are digests of what is forgotten
            vault.put(_TRAINED, f"{row}/{versions.current}", b"".join(sorted(trained - marks)))


def _without_doubt(version: Version, count: int) -> Version:
    """One that knew nothing forgotten so far knows nothing of the next either."""
    return replace(version, forgotten=count) if version.forgotten == count - 1 else version


def check_version(version: str, artefact: Artefact, whose: str, remedy: str) -> None:
    """Raises ShiftMismatch unless the cloud serves this version of the artefact."""
    if version != artefact.version:
        raise ShiftMismatch(
            f"{whose} was trained against another version of {artefact.name} than the cloud serves; {remedy}"
        )


def _read(vault: Vault, row: str, number: int) -> bytes:
    data = vault.get(_TENSORS, f"{row}/{number}")
    if data is None:
        raise VaultDamaged("the vault lacks a version of a shift that it lists")
    return data


def _all(vault: Vault) -> dict[str, Versions]:
    return {row: Versions.from_bytes(data) for row, data in vault.list(_INDEX).items()}


def _put(vault: Vault, row: str, number: int, tensors: bytes, trained: frozenset[bytes] | None) -> None:
    vault.put(_TENSORS, f"{row}/{number}", tensors)
    if trained is not None:
        vault.put(_TRAINED, f"{row}/{number}", b"".join(sorted(trained)))


def _write(vault: Vault, row: str, old: Versions | None, new: Versions) -> None:
    """The list, and nothing of versions that are no longer in it."""
    with vault.transaction():
        vault.put(_INDEX, row, new.to_bytes())
        for number in _numbers(old.kept if old else ()) - _numbers(new.kept):
            for kind in (_TENSORS, _TRAINED):
                vault.delete(kind, f"{row}/{number}")


def _numbers(versions: Iterable[Version]) -> set[int]:
    return {version.number for version in versions}
