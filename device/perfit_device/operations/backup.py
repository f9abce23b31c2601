"""A profile in one sealed file, and back into another profile. Neither asks the cloud."""

from __future__ import annotations

import bisect
import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from perfit_device.operations.operation import Emit, Operation
from perfit_shared.errors import InvalidInput, VaultDamaged

if TYPE_CHECKING:
    from pathlib import Path

    from perfit_device.backup import Row
    from perfit_device.profile import Profile
    from perfit_device.shift_versions import Version
    from perfit_device.vault.store import Vault

__all__ = ["BackUp", "BackedUp", "Restore", "Restored"]

# Kinds of rows. The identity, what the cloud said, and half-done updates belong to the device.
_KEPT = (
    *("settings", "forgotten", "import", "example", "answer", "setting", "shift", "version", "trained"),
    *("updates", "measured", "influence", "seed"),
)
_SETTINGS = ("settings", "")  # the config file's, of this profile
_OTHERS = ("answer", "setting")  # each row by itself: what is there already stays
# Of a shift, by the numbers of its versions. A row's name is the shift's, most with the task behind it.
_RECORDS = ("updates", "measured", "influence", "seed")
_COUNTERS = {"example": ("counter", "history"), "import": ("counter", "imports")}  # of what was ever added


@dataclass(frozen=True)
class BackedUp:
    examples: int
    versions: int
    answers: int  # kept ones
    bytes: int


@dataclass(frozen=True)
class BackUp(Operation[BackedUp]):
    """Write a sealed file, whole or not at all, for its owner alone. Raises InvalidInput."""

    path: str  # absolute
    passphrase: str = field(repr=False)
    force: bool = False  # replace a file that is there

    def run(self, profile: Profile, emit: Emit) -> BackedUp:
        from pathlib import Path

        from perfit_device import backup
        from perfit_device.config import Config
        from perfit_device.vault.crypto import KdfParams
        from perfit_shared.files import written_whole

        path, counts = Path(self.path), dict.fromkeys(_KEPT, 0)

        def rows(vault: Vault) -> Iterator[Row]:
            config = Config.read(profile.settings.config_path)  # as it is now
            settings = {"task": config.task_of(profile.settings.profile)}
            yield backup.Row(*_SETTINGS, json.dumps(settings).encode())
            for kind in _KEPT[1:]:
                for name in vault.names(kind):
                    counts[kind] += 1
                    yield backup.Row(kind, name, vault.get(kind, name) or b"")

        try:
            with (
                profile.vault() as vault,
                vault.transaction(),  # nothing changes meanwhile
                written_whole(path, mode=0o600, replaces=self.force) as file,
            ):
                backup.write(file, rows(vault), self.passphrase, KdfParams())
            size = path.stat().st_size
        except FileExistsError as error:
            raise InvalidInput(f"{path} exists; choose another name, or --force to replace it") from error
        except OSError as error:
            raise InvalidInput(f"cannot write {path}: {error.strerror}; nothing was written") from error
        return BackedUp(counts["example"], counts["version"], counts["answer"], size)


@dataclass(frozen=True)
class Restored:
    examples: int  # added
    known: int  # that were there already
    versions: int  # added
    answers: int
    task: str | None  # the default task of the profile that was backed up
    other_cloud: tuple[
        str, ...
    ] = ()  # artefacts whose shifts are of a cloud that this profile is not enrolled with


@dataclass(frozen=True)
class Restore(Operation[Restored]):
    """All of a backup or nothing. What the profile has stays: history adds, versions are kept beside.

    Raises InvalidInput where the profile has examples or shifts and `merge` is not set, WrongPassphrase,
    VaultDamaged.
    """

    path: str  # absolute
    passphrase: str = field(repr=False)
    merge: bool = False

    def run(self, profile: Profile, emit: Emit) -> Restored:
        from pathlib import Path

        with profile.vault() as vault:
            self._check(profile, vault)
            with vault.transaction():
                return _Restoring(vault).run(self._rows(Path(self.path), profile))

    def _rows(self, path: Path, profile: Profile) -> Iterator[Row]:
        from perfit_device import backup
        from perfit_device.vault.crypto import COSTLIEST, KdfParams

        most = COSTLIEST if profile.settings.costly_vault else KdfParams()
        try:
            with path.open("rb") as file:
                yield from backup.read(file, self.passphrase, most)
        except OSError as error:
            raise InvalidInput(f"cannot read {path}: {error.strerror}; nothing was restored") from error

    def _check(self, profile: Profile, vault: Vault) -> None:
        examples, shifts = vault.count("example"), vault.count("shift")
        if (examples or shifts) and not self.merge:
            name = profile.settings.profile
            raise InvalidInput(
                f'the profile "{name}" has {examples} examples and {shifts} shifts already; `--into {name}` '
                "adds the backup's to them, or choose another --profile"
            )


class _Restoring:
    """Rows of a backup on their way into a vault, in one transaction of the caller's."""

    def __init__(self, vault: Vault) -> None:
        self._vault = vault
        self._examples: list[dict[str, Any]] = []
        # Numbers of the last import and the last example that were here before.
        self._imports, self._order = self._counter("import"), self._counter("example")
        self._shifts: dict[str, Any] = {}  # row → Versions
        self._tensors: dict[str, bytes] = {}
        self._trained: dict[str, bytes] = {}
        self._forgotten: dict[str, int] = {}
        self._settings: dict[str, Any] = {}
        self._others = dict.fromkeys(_OTHERS, 0)
        self._brought: dict[int, dict[str, Any]] = {}  # imports, by their numbers in the backup
        self._records: list[Row] = []
        self._had = set(vault.names("shift"))
        self._orders: list[tuple[int, int]] = []  # of examples, in the backup and here

    def run(self, rows: Iterator[Row]) -> Restored:
        from perfit_device import history
        from perfit_device.cloud_record import read_enrolment

        try:
            for row in rows:
                self._take(row)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise VaultDamaged("the backup holds what no perfit writes; nothing was restored") from error
        added = sum(self._add_example(values) for values in self._examples)
        self._vault.put(*_COUNTERS["example"], str(self._order).encode())
        history.record_tasks(self._vault, history.tasks(self._vault))
        counts = {task: self._count(task) for task in self._tasks()}
        versions = sum(self._add_versions(row, counts) for row in self._shifts)
        for record in self._records:
            self._add_record(record)
        for task, count in counts.items():
            if count:
                self._vault.put("forgotten", task, str(count).encode())
        enrolment = read_enrolment(self._vault)
        cloud_id = enrolment.cloud_id if enrolment else ""
        others = {row.rpartition("/")[2] for row in self._shifts if row.rpartition("/")[0] != cloud_id}
        default = self._settings.get("task")
        return Restored(
            added,
            len(self._examples) - added,
            versions,
            self._others["answer"],
            default if isinstance(default, str) else None,
            tuple(sorted(others)),
        )

    def _take(self, row: Row) -> None:
        from perfit_device import answers
        from perfit_device.history import HistoryItem
        from perfit_device.shift_versions import Versions

        if row.kind == "settings":
            self._settings = dict(json.loads(row.data))
        elif row.kind == "forgotten":
            self._forgotten[row.name] = int(row.data)
        elif row.kind == "example":
            values = json.loads(row.data)
            values["name"] = HistoryItem(**values).name
            bisect.insort(self._examples, values, key=lambda each: int(each["order"]))
        elif row.kind == "import":
            values = json.loads(row.data)
            self._brought[int(values["number"])] = values
        elif row.kind == "shift":
            self._shifts[row.name] = Versions.from_bytes(row.data)
        elif row.kind == "version":
            self._tensors[row.name] = _checked_tensors(row.data)
        elif row.kind == "trained":
            self._trained[row.name] = row.data
        elif row.kind in _RECORDS:
            self._records.append(row)
        elif row.kind in _OTHERS:
            if row.kind == "answer":
                answers.read(row.data)  # raises on what is none
            if not self._vault.has(row.kind, row.name):
                self._vault.put(row.kind, row.name, row.data)
                self._others[row.kind] += 1
        else:
            raise VaultDamaged("the backup is of a newer perfit; use that one, nothing was restored")

    def _counter(self, kind: str) -> int:
        return int(self._vault.get(*_COUNTERS[kind]) or b"0")

    def _add_example(self, values: dict[str, Any]) -> bool:
        """Behind what was added here, if it is new; with the imports that brought it."""
        name = values.pop("name")
        if self._vault.has("example", name):
            return False
        self._order += 1
        self._orders.append((values["order"], self._order))
        values["order"] = self._order
        if "imports" in values:
            for number in set(values["imports"]) & self._brought.keys():
                self._add_import(self._brought.pop(number))
            values["imports"] = [int(number) + self._imports for number in values["imports"]]
        self._vault.put("example", name, json.dumps(values, ensure_ascii=False).encode())
        return True

    def _add_record(self, row: Row) -> None:
        """Where the profile had no such shift: its versions then keep their numbers."""
        from perfit_device.training import journal

        shift = row.name if row.kind == "seed" else row.name.rpartition("/")[0]
        if shift in self._had or self._vault.has(row.kind, row.name):
            return
        self._vault.put(row.kind, row.name, row.data)
        if row.kind == "seed":
            _checked_tensors(row.data)
        elif row.kind == "updates":
            entries = journal.read(self._vault, row.name)
            self._vault.delete(row.kind, row.name)
            for entry in entries:  # its examples have other numbers here
                known = max((new for old, new in self._orders if old <= entry.known), default=0)
                journal.add(self._vault, row.name, replace(entry, known=known))

    def _add_import(self, values: dict[str, Any]) -> None:
        """One that brought a new example, under a number behind those of the imports that were here."""
        number = int(values["number"]) + self._imports
        data = json.dumps(values | {"number": number}, ensure_ascii=False).encode()
        self._vault.put("import", str(number), data)
        self._vault.put(*_COUNTERS["import"], str(max(number, self._counter("import"))).encode())

    def _tasks(self) -> set[str]:
        return {versions.task for versions in self._shifts.values()} | self._forgotten.keys()

    def _count(self, task: str) -> int:
        """The value of `history.forgotten` from now on."""
        from perfit_device import history

        return max(history.forgotten(self._vault, task), self._forgotten.get(task, 0))

    def _add_versions(self, row: str, counts: dict[str, int]) -> int:
        """Those whose tensors are not there yet."""
        from perfit_device import personal

        versions = self._shifts[row]
        cloud_id, _, artefact = row.rpartition("/")
        there = personal.read_versions(self._vault, cloud_id, artefact)
        had = {
            personal.read_tensors(self._vault, cloud_id, artefact, each.number).to_bytes()
            for each in (there.kept if there else ())
        }
        more = []
        for version in versions.kept:
            name = f"{row}/{version.number}"
            tensors, marks = self._tensors[name], self._trained.get(name)
            if tensors in had:
                continue
            trained = None if marks is None else personal.marks_from(marks)
            more.append((self._restored(version, versions.task, counts), tensors, trained))
        if more:
            personal.add(self._vault, row, versions.task, more, versions.current)
        return len(more)

    def _restored(self, version: Version, task: str, counts: dict[str, int]) -> Version:
        """It knows nothing forgotten where it knew nothing then: what it learned from came back with it."""
        count, then = counts[task], self._forgotten.get(task, 0)
        forgotten = count if version.forgotten >= then else min(version.forgotten, count - 1)
        return replace(version, forgotten=forgotten, origin=version.origin or "restored")


def _checked_tensors(data: bytes) -> bytes:
    """Raises VaultDamaged unless they can be a shift's: names, shapes, and numbers that are some."""
    import numpy as np
    import safetensors
    import safetensors.numpy

    from perfit_shared.errors import InvalidTensors
    from perfit_shared.shifts import ShiftTensors

    damaged = VaultDamaged("the backup holds a shift that cannot be read; nothing was restored")
    try:
        tensors = ShiftTensors.from_named(safetensors.numpy.load(data))
    except (InvalidTensors, safetensors.SafetensorError) as error:
        raise damaged from error
    if not all(np.isfinite(array).all() for _, array in tensors.named()):
        raise damaged
    return data
