"""What a profile has: its cloud, certificate, tasks, examples and shifts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from perfit_device import history, personal
from perfit_device.cloud.identity import certificate_life, identity_in
from perfit_device.cloud.retry import NO_RETRIES
from perfit_device.cloud_record import read_enrolment, read_record
from perfit_device.personal import Version
from perfit_device.profile import Profile
from perfit_device.training import update as updates
from perfit_shared.errors import CertificateSuperseded, PerfitError

if TYPE_CHECKING:
    from perfit_device.vault.store import Vault

__all__ = ["Status", "TaskStatus", "status"]


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


def status(profile: Profile) -> tuple[Status, PerfitError | None]:
    """With why the cloud does not serve this device, None when it does."""
    trouble = _trouble(profile)
    with profile.vault() as vault:
        enrolment = read_enrolment(vault)
        tasks = _tasks(vault)
    until = certificate_life(enrolment.certificate)[1] if enrolment else None
    found = Status(
        profile=profile.settings.profile,
        vault=str(profile.settings.vault_path),
        address=enrolment.address if enrolment else None,
        cloud_id=enrolment.cloud_id if enrolment else None,
        identity=identity_in(enrolment.certificate) if enrolment else None,
        certificate_until=f"{until:%Y-%m-%dT%H:%M:%SZ}" if until else None,
        tasks=tasks,
        cloud="reachable" if trouble is None else str(trouble),
        renewed_elsewhere=isinstance(trouble, CertificateSuperseded),
    )
    return found, trouble


def _trouble(profile: Profile) -> PerfitError | None:
    try:
        profile.connect(NO_RETRIES)
        return None
    except PerfitError as error:
        return error


def _tasks(vault: Vault) -> dict[str, TaskStatus]:
    record, items = read_record(vault), history.load(vault)
    by_name = {name: record.task_of(name) for name in record.tasks}
    # Examples of tasks that the cloud does not serve are the user's all the same.
    by_name |= {item.task: item.task for item in items if item.task not in by_name.values()}
    found = {}
    for name, task in sorted(by_name.items()):
        versions = personal.read_versions(vault, record.cloud_id, name)
        half_done = updates.read_checkpoint(vault, updates.update_row(record.cloud_id, name, task))
        found[name] = TaskStatus(
            examples=sum(item.task == task for item in items),
            updates=versions.now.updates if versions else 0,
            version=versions.now.artefact_version if versions else None,
            half_done=half_done.step if half_done is not None else None,
            can_undo=versions is not None and versions.before is not None,
            current=versions.current if versions else None,
            versions=versions.kept if versions else (),
        )
    return found
