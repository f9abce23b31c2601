"""Updates that nobody asks for: `perfit update --auto` once, and an agent again and again.

    updates = AutomaticUpdates(holder, enabled=config.update_auto, by_keyring=config.update_unlock_by_keyring)
    updates.wake()      # by the agent's timer, and before its idle lock

What decides is `training.automatic`; here it gets what it looks at.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Protocol

from perfit_device import machine
from perfit_device.operations.operation import Emit, Operation, Performer
from perfit_device.training import automatic, journal
from perfit_device.training.automatic import Due, NotDue, State
from perfit_shared.errors import Busy, PerfitError, UpdateFailed
from perfit_shared.splits import LEAST_HISTORY, SMALLEST_PART

if TYPE_CHECKING:
    from perfit_device.cloud_record import CloudRecord
    from perfit_device.history import HistoryItem
    from perfit_device.profile import Profile
    from perfit_device.vault.store import Vault

__all__ = ["AutomaticUpdate", "AutomaticUpdates", "Decision", "Holder", "state_of", "warnings_of"]


@dataclass(frozen=True)
class Decision:
    """What became of one artefact."""

    artefact: str
    trained: bool
    reason: str = ""  # why not
    accepted: bool = False


@dataclass(frozen=True)
class AutomaticUpdate(Operation[tuple[Decision, ...]]):
    """Train what is due, of all artefacts or of one, and say why the others are not."""

    task: str | None = None  # name of an artefact

    def run(self, profile: Profile, emit: Emit) -> tuple[Decision, ...]:
        return tuple(_decide(profile, name, emit) for name in _names(profile, self.task))


def _names(profile: Profile, task: str | None) -> list[str]:
    """By the cloud's last description, so that a cloud that is away costs nothing."""
    from perfit_device.cloud_record import read_record

    if task is not None:
        profile.task(task)  # raises NotFound
        return [task]
    with profile.vault() as vault:
        return sorted(read_record(vault).tasks)


def _decide(profile: Profile, name: str, emit: Emit) -> Decision:
    from perfit_device import history
    from perfit_device.cloud.retry import NO_RETRIES
    from perfit_device.cloud_record import read_record

    with profile.vault() as vault:
        record = read_record(vault)
        state = state_of(vault, record, name, history.load(vault, record.task_of(name)))
    found = automatic.due(replace(state, machine=machine.look(profile.settings.vault_path.parent)))
    if isinstance(found, Due):
        try:
            profile.connect(NO_RETRIES)
        except PerfitError as error:
            found = NotDue(str(error))
    if isinstance(found, NotDue):
        return Decision(name, trained=False, reason=found.reason)
    return _train(profile, name, emit)


def _train(profile: Profile, name: str, emit: Emit) -> Decision:
    from perfit_device.operations.update import Update

    try:
        done = Update(task=name).run(profile, emit)
    except (Busy, UpdateFailed) as error:  # one runs already, or stopped half-way: the next look goes on
        return Decision(name, trained=False, reason=str(error))
    if done.trained is None:
        return Decision(name, trained=False, reason="nothing is new")
    return Decision(name, trained=True, accepted=done.trained.gate.accepted)


def state_of(vault: Vault, record: CloudRecord, name: str, items: Sequence[HistoryItem]) -> State:
    """Of the vault alone; the machine is one that has everything."""
    from perfit_device import history, personal
    from perfit_device.cloud_record import read_enrolment
    from perfit_device.refusals import names_refused
    from perfit_device.training import update as updates
    from perfit_shared.tasks import Task

    row = updates.update_row(record.cloud_id, name, record.task_of(name))
    refused = names_refused(vault, row)
    if name in record.tasks:
        items = history.usable(items, Task.from_json(record.tasks[name]))
    items = [item for item in items if item.name not in refused]
    entries = journal.read(vault, row)
    known = entries[-1].known if entries else 0
    has_test = any(item.part == "test" for item in items)
    versions = personal.read_versions(vault, record.cloud_id, name)
    enrolment = read_enrolment(vault)
    return State(
        usable=sum(item.part != "test" for item in items),
        least=LEAST_HISTORY - SMALLEST_PART if has_test else LEAST_HISTORY,
        new=0 if _is_finished(vault, row, items) else sum(item.order > known for item in items),
        machine=machine.Machine(1, 0.0, machine.Power(), 2**62),
        room=_room(vault, record.cloud_id, name, versions.current if versions else None),
        half_done=updates.read_checkpoint(vault, row) is not None,
        hours_since=_hours_since(entries[-1].date) if entries else float("inf"),
        other_artefact=bool(
            versions and record.versions.get(name, "") not in ("", versions.now.artefact_version)
        ),
        clock=_clock(enrolment.certificate) if enrolment else "",
        cloud="" if enrolment else "the profile is not enrolled",
    )


def _is_finished(vault: Vault, row: str, items: Sequence[HistoryItem]) -> bool:
    """Whether the update that ended last, perhaps an earlier perfit's, had this very history."""
    from perfit_device import history
    from perfit_device.training import update as updates
    from perfit_shared.errors import InvalidData

    last = updates.read_finished(vault, row)
    try:
        return last is not None and last.plan.history == history.split(items).digest()
    except InvalidData:  # too few
        return False


_TENSORS_AT_ONCE = 3 * 4 + 3 + 1  # of a checkpoint with three folds, a version and a seed
_ROOM = 8 << 20  # bytes, where the size of the tensors is not known yet


def _room(vault: Vault, cloud_id: str, name: str, version: int | None) -> int:
    """Bytes, twice: the vault writes a row beside the one that it replaces."""
    from perfit_device import personal

    if version is None:
        return _ROOM
    size = len(personal.read_tensors(vault, cloud_id, name, version).to_bytes())
    return max(_ROOM, 2 * _TENSORS_AT_ONCE * size)


def _hours_since(date: str) -> float:
    return (datetime.now(UTC) - datetime.fromisoformat(date)).total_seconds() / 3600


def _clock(certificate: bytes) -> str:
    from perfit_device.cloud.identity import certificate_life

    return automatic.clock_trouble(certificate_life(certificate), datetime.now(UTC))


def warnings_of(profile: Profile) -> list[str]:
    """What speaks against an update that a person asked for; it runs all the same."""
    from perfit_device.cloud_record import read_enrolment

    with profile.vault() as vault:
        enrolment = read_enrolment(vault)
    clock = _clock(enrolment.certificate) if enrolment else ""
    battery = automatic.battery_warning(machine.look(profile.settings.vault_path.parent))
    return [text for text in (clock, battery) if text]


class Holder(Protocol):
    """The agent, as `AutomaticUpdates` needs it."""

    @property
    def is_locked(self) -> bool: ...

    def unlock_by_keyring(self) -> bool:
        """Whether it could; a vault locked by a passphrase stays locked."""

    def hold(self) -> AbstractContextManager[Performer]:
        """The profile, which does not lock itself until the block ends."""


@dataclass(frozen=True)
class AutomaticUpdates:
    """What an agent's timer wakes, and what its idle lock asks before it locks."""

    holder: Holder
    enabled: bool = True  # `update.auto`
    by_keyring: bool = False  # `update.unlock_by_keyring`

    def wake(self, emit: Emit = lambda _: None) -> tuple[Decision, ...]:
        """Train what is due, to its end. Nothing where it is off, or locked without leave to unlock."""
        if not self.enabled:
            return ()
        if self.holder.is_locked and not (self.by_keyring and self.holder.unlock_by_keyring()):
            return ()
        with self.holder.hold() as performer:
            return run_once(performer, emit)


def run_once(performer: Performer, emit: Emit = lambda _: None) -> tuple[Decision, ...]:
    """Decide and train. An update that fails keeps its steps, and the next wake goes on."""
    return performer.perform(AutomaticUpdate(), emit)
