"""What a profile has: its cloud, certificate, tasks, examples and shifts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from perfit_device import history, machine, personal, starts
from perfit_device.operations.automatic import state_of
from perfit_device.operations.operation import Emit, Operation
from perfit_device.shift_versions import Version, Versions
from perfit_device.starts import Choice
from perfit_device.training import automatic, journal
from perfit_device.training.automatic import NotDue
from perfit_device.training.journal import Entry, Measured
from perfit_shared.errors import CertificateSuperseded, InvalidData, PerfitError, exit_code

if TYPE_CHECKING:
    from perfit_device.history import HistoryItem
    from perfit_device.profile import Profile
    from perfit_device.vault.store import Vault

__all__ = ["ProfileStatus", "Status", "TaskStatus"]


@dataclass(frozen=True)
class TaskStatus:
    """One artefact of the cloud, or a task that the cloud does not serve."""

    examples: int
    updates: int  # that made the current version; 0: there is none
    version: str | None  # of the artefact that it was made for
    half_done: int | None  # the step at which an update waits
    can_undo: bool
    current: int | None  # number of the current version
    versions: Sequence[Version]
    split: Mapping[str, int]  # examples to train, gate and test; empty where they are too few
    new: int  # examples since the update that ended last
    due: bool  # whether an update would run by itself now
    not_due: str  # why not
    last: Entry | None  # the update that ended last
    measured: Measured | None  # what `evaluate` found last
    best: str | None  # the shift that loses least, by that or by the gate
    start: Choice | None  # where the user starts, where that was chosen


@dataclass(frozen=True)
class Status:
    profile: str
    vault: str  # path
    address: str | None
    cloud_id: str | None
    identity: str | None
    certificate_until: str | None  # ISO 8601, UTC
    tasks: dict[str, TaskStatus]
    cloud: str  # "reachable", or why it does not serve this device
    renewed_elsewhere: bool  # somebody else renewed this identity's certificate
    exit_code: int  # by why the cloud does not serve this device; 0 when it does


@dataclass(frozen=True)
class ProfileStatus(Operation[Status]):
    def run(self, profile: Profile, emit: Emit) -> Status:
        from perfit_device.cloud.identity import certificate_life, identity_in
        from perfit_device.cloud_record import read_enrolment

        trouble = _trouble(profile)
        here = machine.look(profile.settings.vault_path.parent)
        with profile.vault() as vault:
            enrolment = read_enrolment(vault)
            tasks = _tasks(vault, here, trouble)
        until = certificate_life(enrolment.certificate)[1] if enrolment else None
        return Status(
            profile=profile.settings.profile,
            vault=str(profile.settings.vault_path),
            address=enrolment.address if enrolment else None,
            cloud_id=enrolment.cloud_id if enrolment else None,
            identity=identity_in(enrolment.certificate) if enrolment else None,
            certificate_until=f"{until:%Y-%m-%dT%H:%M:%SZ}" if until else None,
            tasks=tasks,
            cloud="reachable" if trouble is None else str(trouble),
            renewed_elsewhere=isinstance(trouble, CertificateSuperseded),
            exit_code=0 if trouble is None else exit_code(trouble),
        )


def _trouble(profile: Profile) -> PerfitError | None:
    """Why the cloud does not serve this device; None when it does."""
    from perfit_device.cloud.retry import NO_RETRIES

    try:
        profile.connect(NO_RETRIES, most_seconds=0)
        return None
    except PerfitError as error:
        return error


def _tasks(vault: Vault, here: machine.Machine, trouble: PerfitError | None) -> dict[str, TaskStatus]:
    from perfit_device.cloud_record import read_record
    from perfit_device.refusals import names_refused
    from perfit_device.training import update as updates

    record, items = read_record(vault), history.load(vault)
    by_name = {name: record.task_of(name) for name in record.tasks}
    # Examples of tasks that the cloud does not serve are the user's all the same.
    by_name |= {item.task: item.task for item in items if item.task not in by_name.values()}
    found = {}
    for name, task in sorted(by_name.items()):
        versions = personal.read_versions(vault, record.cloud_id, name)
        row = updates.update_row(record.cloud_id, name, task)
        half_done = updates.read_checkpoint(vault, row)
        mine = [item for item in items if item.task == task]
        state = state_of(vault, record, name, mine)
        cloud = str(trouble) if trouble else state.cloud
        if name not in record.tasks:
            cloud = "the cloud does not serve this task"
        decision = automatic.due(replace(state, machine=here, cloud=cloud))
        entries, measured = journal.read(vault, row), journal.read_measured(vault, row)
        found[name] = TaskStatus(
            examples=len(mine),
            updates=versions.now.updates if versions else 0,
            version=versions.now.artefact_version if versions else None,
            half_done=half_done.step if half_done is not None else None,
            can_undo=versions is not None and versions.before is not None,
            current=versions.current if versions else None,
            versions=versions.kept if versions else (),
            split=_split([item for item in mine if item.name not in names_refused(vault, row)]),
            new=state.new,
            due=not isinstance(decision, NotDue),
            not_due=decision.reason if isinstance(decision, NotDue) else "",
            last=entries[-1] if entries else None,
            measured=measured,
            best=_best(measured, versions),
            start=starts.read_choice(vault, row),
        )
    return found


def _split(items: Sequence[HistoryItem]) -> dict[str, int]:
    try:
        parts = history.split(items)
    except InvalidData:
        return {}
    return {"train": len(parts.train), "gate": len(parts.gate), "test": len(parts.test)}


def _best(measured: Measured | None, versions: Versions | None) -> str | None:
    """What `evaluate` found of the current version; without that, what its gate did."""
    if measured is not None and measured.version == (versions.current if versions else None):
        return measured.best
    learned = versions.now.learned if versions else None
    if learned is None or learned.gate_before is None or learned.gate_after is None:
        return None
    return "personal" if learned.gate_after < learned.gate_before else "seed"
