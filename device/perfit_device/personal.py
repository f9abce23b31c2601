"""Personal shifts in the vault: for each (cloud, artefact) the last versions, one of which is current.

    shift    CLOUD/ARTEFACT           JSON: which version is current, and what is known of each
    version  CLOUD/ARTEFACT/NUMBER    the tensors of one version

An update adds a version behind the current one. `undo` makes an earlier one current; the later ones stay
until the next update takes their place.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from perfit_device.vault.store import Vault
from perfit_shared.errors import InvalidInput, InvalidTensors, NotFound, ShiftMismatch, VaultDamaged

if TYPE_CHECKING:
    from perfit_device.cloud.codec import Artefact
    from perfit_shared.shifts import ShiftTensors

__all__ = [
    "MOST_VERSIONS",
    "PersonalShift",
    "TrainingSummary",
    "Version",
    "Versions",
    "artefacts",
    "check_version",
    "forget_earlier",
    "import_versions",
    "load",
    "read_tensors",
    "read_versions",
    "shift_row",
    "store",
    "undo",
]

MOST_VERSIONS = 10  # kept of one shift, the current one among them
_INDEX, _TENSORS = "shift", "version"  # kinds of rows


@dataclass(frozen=True)
class TrainingSummary:
    """What a version was made of. None where unknown: vaults of format 1 did not record it.

    `examples` counts those that trained, the oldest of the history. Losses are in nats a token. Those of
    training are means over the first and the last epoch's steps; the gate's are of what training began
    with, and of this version.
    """

    examples: int | None = None
    train_before: float | None = None
    train_after: float | None = None
    gate_before: float | None = None
    gate_after: float | None = None


@dataclass(frozen=True)
class PersonalShift:
    """The current version of a user's shift, and how many updates made it."""

    tensors: ShiftTensors
    updates: int
    # The value of `history.forgotten` when this shift, or the one that it continues, began at the seed.
    # It may remember what was forgotten since.
    forgotten: int = 0
    learned: TrainingSummary = field(default_factory=TrainingSummary)


@dataclass(frozen=True)
class Version:
    """What is known of one version, beside its tensors."""

    number: int  # from 1
    artefact_version: str
    updates: int
    forgotten: int = 0  # as of PersonalShift
    date: str = ""  # ISO 8601, UTC; "" where unknown
    learned: TrainingSummary = field(default_factory=TrainingSummary)


@dataclass(frozen=True)
class Versions:
    """The kept versions of one shift, by their numbers, and the number of the current one."""

    task: str  # name of the artefact's task
    current: int
    kept: tuple[Version, ...]

    def find(self, number: int) -> Version | None:
        return next((version for version in self.kept if version.number == number), None)

    @property
    def now(self) -> Version:
        """The current version."""
        return next(version for version in self.kept if version.number == self.current)

    @property
    def before(self) -> Version | None:
        """The version that `undo` makes current."""
        earlier = [version for version in self.kept if version.number < self.current]
        return earlier[-1] if earlier else None

    def to_bytes(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Versions:
        """Raises VaultDamaged."""
        try:
            values = json.loads(data)
            kept = [
                Version(**each | {"learned": TrainingSummary(**each["learned"])}) for each in values["kept"]
            ]
            versions = cls(values["task"], values["current"], tuple(kept))
            if versions.find(versions.current) is None:
                raise ValueError("the current version is not kept")
            return versions
        except (ValueError, KeyError, TypeError) as error:
            raise VaultDamaged("the vault holds a list of versions that cannot be read") from error


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


def load(vault: Vault, cloud_id: str, artefact: Artefact) -> PersonalShift | None:
    """None when this user has none yet. Raises ShiftMismatch when the artefact has changed since."""
    from perfit_shared.shifts import ShiftTensors

    versions = read_versions(vault, cloud_id, artefact.name)
    if versions is None:
        return None
    now = versions.now
    check_version(
        now.artefact_version, artefact, "your personal shift", "`perfit update --fresh` trains a new one"
    )
    data = _read(vault, shift_row(cloud_id, artefact.name), now.number)
    tensors = ShiftTensors.from_bytes(data, artefact.spec, artefact.spec.personal_rank)
    return PersonalShift(tensors, now.updates, now.forgotten, now.learned)


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


def store(vault: Vault, cloud_id: str, artefact: Artefact, shift: PersonalShift) -> None:
    """Add a version behind the current one, and make it current.

    It removes undone versions, and the oldest of more than ten. It also removes versions that may remember
    what this one does not: a shift trained afresh after examples were forgotten is there to unlearn them.
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
    )
    earlier = [
        each
        for each in kept
        if old is not None and each.number <= old.current and each.forgotten >= shift.forgotten
    ]
    new = Versions(artefact.task.name, version.number, (*earlier, version)[-MOST_VERSIONS:])
    with vault.transaction():
        _write(vault, row, old, new)
        vault.put(_TENSORS, f"{row}/{version.number}", shift.tensors.to_bytes())


def import_versions(vault: Vault, row: str, rows: Sequence[tuple[bytes, Mapping[str, str]]]) -> None:
    """Make these (tensors, metadata) the versions of a shift that has no list yet; the last is current."""
    kept = []
    for number, (data, metadata) in enumerate(rows, start=1):
        updates, forgotten = (int(metadata.get(key, "0")) for key in ("updates", "forgotten"))
        kept.append(Version(number, metadata.get("version", ""), updates, forgotten))
        vault.put(_TENSORS, f"{row}/{number}", data)
    task = rows[-1][1].get("task", row.rpartition("/")[2])
    _write(vault, row, None, Versions(task, len(kept), tuple(kept)))


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
        raise NotFound(f"version {to} of {artefact} is not kept; `perfit undo --list` shows those that are")
    if version is None:
        raise NotFound(f"there is no earlier version of your shift for {artefact} to go back to")
    _write(vault, shift_row(cloud_id, artefact), versions, replace(versions, current=version.number))
    return version


def forget_earlier(vault: Vault, tasks: Collection[str]) -> None:
    """Delete all versions of these tasks' shifts for good, but for the current ones."""
    for row, data in vault.list(_INDEX).items():
        versions = Versions.from_bytes(data)
        if versions.task in tasks and len(versions.kept) > 1:
            _write(vault, row, versions, replace(versions, kept=(versions.now,)))


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


def _write(vault: Vault, row: str, old: Versions | None, new: Versions) -> None:
    """The list, and nothing of versions that are no longer in it."""
    with vault.transaction():
        vault.put(_INDEX, row, new.to_bytes())
        for number in _numbers(old.kept if old else ()) - _numbers(new.kept):
            vault.delete(_TENSORS, f"{row}/{number}")


def _numbers(versions: Iterable[Version]) -> set[int]:
    return {version.number for version in versions}
