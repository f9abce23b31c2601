"""One profile of this device, opened: its vault, its cloud, its artefacts.

What a profile can do stands in `operations`, a file for each: requests that `perform` carries out. The
command line parses, asks and prints around them.

    with Profile.open(DeviceSettings("default"), passphrase=ask) as profile:
        profile.perform(Undo())

Nothing here prints or prompts: it calls `passphrase` when the vault needs one, and `notify` with lines for
a person. Heavy modules are imported where they are needed, so that what works offline loads no gRPC.
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from typing import TYPE_CHECKING, TypeVar

from perfit_device import history, personal
from perfit_device.cloud.retry import RetryPolicy
from perfit_device.cloud_record import read_enrolment, read_record, write_enrolment, write_record
from perfit_device.encoded_shifts import EncodedShifts
from perfit_device.file_lock import locked_file
from perfit_device.settings import DeviceSettings
from perfit_device.vault.crypto import wipe
from perfit_device.vault.store import Vault
from perfit_shared.errors import (
    Busy,
    InvalidInput,
    NotAuthenticated,
    NotFound,
    ShiftMismatch,
    Unavailable,
    VaultBusy,
)
from perfit_shared.tasks import TASKS, Task
from perfit_shared.terminal import one_line

if TYPE_CHECKING:
    from perfit_device.cloud.client import Cloud
    from perfit_device.cloud.codec import Artefact, CloudInfo, EncodedShift
    from perfit_device.cloud.identity import Enrolment
    from perfit_device.history import HistoryItem
    from perfit_device.operations.operation import Emit, Operation

__all__ = ["OPENING_SECONDS", "Profile", "check_fields", "default_task", "listed"]

Result = TypeVar("Result")
# What the caller of an agent means where it names no task: its config and environment may be newer.
default_task: ContextVar[str | None] = ContextVar("default_task")
OPENING_SECONDS = 10.0  # that the first calls wait for a cloud that is away
_DESCRIBED_SECONDS = (
    60.0  # after which a cloud is asked again what it serves; it has closed the channel by then
)


class Profile:
    """An open profile; `open` or `create` one, and use `with`.

    Several threads may share it. A caller with a long call ahead may `release_vault`, so that other
    processes can use the vault meanwhile; an agent, which serves those, `keeps_vault`.
    """

    def __init__(
        self,
        settings: DeviceSettings,
        vault: Vault,
        notify: Callable[[str], None],
        *,
        keeps_vault: bool = False,
    ) -> None:
        self.settings = settings
        self._notify = ContextVar("notify", default=notify)
        self._vault = vault
        self._key = vault.copy_key()  # reopens a released vault without a prompt or a key derivation
        self._keeps_vault = keeps_vault
        self._encoded_shifts = EncodedShifts()
        self._using = threading.RLock()  # of the next three, and while the vault is opened or closed
        self._users = 0
        self._is_released = self._is_closed = False
        self._connecting = threading.Lock()
        self._connected: tuple[Cloud, CloudInfo] | None = None
        self._described = 0.0  # when the cloud said what it serves, by the monotonic clock

    # -- opening and closing -------------------------------------------------------------------

    @classmethod
    def open(
        cls,
        settings: DeviceSettings,
        *,
        passphrase: Callable[[], str],
        notify: Callable[[str], None] = lambda _: None,
        keeps_vault: bool = False,
    ) -> Profile:
        """Raises NotFound, VaultBusy, WrongPassphrase or VaultDamaged."""
        path, costly = settings.vault_path, settings.costly_vault
        settings.check_exists()
        given = passphrase() if Vault.lock_of(path, costly=costly) == "passphrase" else None
        return cls(settings, Vault.open(path, given, costly=costly), notify, keeps_vault=keeps_vault)

    @classmethod
    def create(
        cls,
        settings: DeviceSettings,
        *,
        passphrase: str | None,
        notify: Callable[[str], None] = lambda _: None,
    ) -> Profile:
        """A new profile, locked by `passphrase`, or by the OS keyring where it is None."""
        return cls(settings, Vault.create(settings.vault_path, passphrase), notify)

    def close(self) -> None:
        """Ends every call in flight, and overwrites the key as soon as no thread uses the vault."""
        self.disconnect()
        with self._using:
            self._keeps_vault, self._is_closed = False, True
            self.release_vault()

    def __enter__(self) -> Profile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- doing something with it ---------------------------------------------------------------

    def perform(self, operation: Operation[Result], emit: Emit = lambda _: None) -> Result:
        """What `notify` gets meanwhile from this thread goes to `emit` as notes."""
        from perfit_device.operations.operation import Note

        token = self._notify.set(lambda text: emit(Note(text)))
        try:
            return operation.run(self, emit)
        except ShiftMismatch:
            self._described = 0.0  # the cloud may have replaced an artefact since
            raise
        finally:
            self._notify.reset(token)
            self.release_vault()
            self._encoded_shifts.drop_changed(self._vault)

    def notify(self, text: str) -> None:
        """A line for a person."""
        self._notify.get()(text)

    # -- the vault -----------------------------------------------------------------------------

    @contextlib.contextmanager
    def vault(self) -> Iterator[Vault]:
        """The vault. Once it was released, the first user opens it again, and the last one closes it.

        Raises Unavailable while another process holds it: the call that needs it can be tried again.
        """
        with self._using:
            if self._vault.closed:
                self._vault = self._open_again()
            self._users += 1
            vault = self._vault
        try:
            yield vault
        finally:
            with self._using:
                self._users -= 1
                self._close_unused()

    def _open_again(self) -> Vault:
        if self._is_closed:
            raise Unavailable("the profile was closed meanwhile")
        path, costly = self.settings.vault_path, self.settings.costly_vault
        try:
            return Vault.open(path, None, key=self._key, costly=costly)
        except VaultBusy as error:
            raise Unavailable(str(error)) from error

    def _close_unused(self) -> None:
        if self._is_released and not self._users:
            self._encoded_shifts.wipe()
            self._vault.close()
            if self._is_closed:
                wipe(self._key)

    def release_vault(self) -> None:
        """Let other processes have it, as soon as no thread uses it."""
        with self._using:
            if not self._keeps_vault:
                self._is_released = True
                self._close_unused()

    @contextlib.contextmanager
    def updating(self, row: str) -> Iterator[None]:
        """While an update of this row runs, here or in another process. Raises Busy where one does."""
        name = hashlib.sha256(row.encode()).hexdigest()[:16]  # tells nothing of the task
        with locked_file(self.settings.vault_path.with_name(f"update-{name}.lock")) as is_ours:
            if not is_ours:
                raise Busy("an update of this task is running already; wait for it, or end it with Ctrl-C")
            yield

    # -- the cloud -----------------------------------------------------------------------------

    def connect(
        self, retry_policy: RetryPolicy | None = None, *, most_seconds: float = _DESCRIBED_SECONDS
    ) -> tuple[Cloud, CloudInfo]:
        """The profile's cloud, and what it serves; one connection as long as the profile is open.

        The cloud is asked again what it serves when its last answer is older than `most_seconds`. The
        default policy is that of `while_opening`. Raises NotAuthenticated when the profile is not enrolled.
        """
        policy = retry_policy or self.while_opening()
        with self._connecting:
            if self._connected is not None and self._connected[0].sealing != self.settings.sealing():
                self.disconnect()  # the setting changed, as an agent finds it
            if self._connected is None:
                self._connected = self._checked(*policy.call(self._connector()))
            elif time.monotonic() - self._described > most_seconds or not self._described:
                cloud = self._connected[0]
                self._connected = self._checked(cloud, policy.call(cloud.describe))
            return self._connected

    def disconnect(self) -> None:
        """Ends every call in flight; the next one connects anew."""
        connected, self._connected = self._connected, None
        if connected is not None:
            connected[0].close()

    def while_opening(self) -> RetryPolicy:
        """For first calls: a person waits for them, so `notify` says why they take longer."""
        return RetryPolicy(give_up=OPENING_SECONDS, notify=self.notify)

    def _checked(self, cloud: Cloud, info: CloudInfo) -> tuple[Cloud, CloudInfo]:
        """What the cloud just described; it goes into the vault, too."""
        try:
            if info.cloud_id != cloud.enrolment.cloud_id:
                raise NotAuthenticated(
                    f"the server at {cloud.address} is another cloud than the one this profile "
                    "is enrolled with; ask the operator for a new invite"
                )
            with self.vault() as vault:
                write_record(vault, info)
        except BaseException:
            self._connected = None
            cloud.close()
            raise
        self._described = time.monotonic()
        return cloud, info

    def _connector(self) -> Callable[[], tuple[Cloud, CloudInfo]]:
        """Makes a connection each time it is called; a certificate that one try renewed serves the next."""
        from perfit_device.cloud.client import Cloud

        enrolment = self._enrolment()
        if enrolment is None:
            raise NotAuthenticated(
                f'the profile "{self.settings.profile}" is not enrolled; `perfit enroll INVITE` does it'
            )

        def save(new: Enrolment) -> None:
            nonlocal enrolment  # the next try needs the new one: its first use retires the old one
            with self.vault() as vault:
                write_enrolment(vault, new)
            enrolment = new

        def connect() -> tuple[Cloud, CloudInfo]:
            cloud = Cloud(
                enrolment, on_renewed=save, reload_enrolment=self._enrolment, sealing=self.settings.sealing()
            )
            try:
                return cloud, cloud.describe()
            except BaseException:
                cloud.close()
                raise

        return connect

    def _enrolment(self) -> Enrolment | None:
        with self.vault() as vault:
            return read_enrolment(vault)

    # -- artefacts, tasks, shifts --------------------------------------------------------------

    def artefact(self, task: str | None) -> Artefact:
        """The cloud's artefact of that name; else the only one, of those that this user has a shift for, or
        where there is none, examples.
        """
        _, info = self.connect()
        by_name = {artefact.name: artefact for artefact in info.artefacts}
        task = task or self._default
        if task is None:
            return by_name[self._default_task(by_name, info.cloud_id)]
        if task not in by_name:
            raise NotFound(f'the cloud has no task "{one_line(task)[:64]}"; it has {listed(by_name)}')
        return by_name[task]

    def task(self, name: str | None) -> Task:
        """A task by name, as the cloud last described it; offline, and before enrolment too."""
        with self.vault() as vault:
            record = read_record(vault)
        name = name or self._default
        if name is None:
            if not record.tasks:
                raise NotFound("say which task the examples are of, with --task NAME")
            name = self._default_task(record.tasks, record.cloud_id)
        if name in record.tasks:
            return Task.from_json(record.tasks[name])
        if record.tasks:
            raise NotFound(f'the cloud has no task "{one_line(name)[:64]}"; it has {listed(record.tasks)}')
        if name not in TASKS:  # a cloud may have others
            raise NotFound(
                f'no task "{one_line(name)[:64]}" is known before `perfit enroll`; there are {listed(TASKS)}'
            )
        return TASKS[name]

    @property
    def _default(self) -> str | None:
        """Of the one who asks."""
        return default_task.get(self.settings.task)

    def _default_task(self, names: Iterable[str], cloud_id: str) -> str:
        names = list(names)
        if not names:
            raise NotFound("the cloud serves no artefact; ask its operator")
        if len(names) == 1:
            return names[0]
        with self.vault() as vault:
            mine = [name for name in names if name in personal.artefacts(vault, cloud_id)]
            if not mine:
                mine = sorted(history.tasks(vault) & {*names})
        if len(mine) != 1:
            raise NotFound(f"the cloud has several tasks; choose one with --task: {listed(names)}")
        return mine[0]

    def encoded_shift(self, artefact: Artefact) -> EncodedShift | None:
        """The current personal shift as answers want it on the wire; None when this user has none yet.

        Raises ShiftMismatch when the artefact has changed since.
        """
        _, info = self.connect()
        with self.vault() as vault:
            return self._encoded_shifts.get(vault, info.cloud_id, artefact)

    def trained(self, task: str | None) -> tuple[str, str]:
        """(cloud id, artefact) of the personal shift that is meant. Works offline."""
        with self.vault() as vault:
            cloud_id = read_record(vault).cloud_id
            names = personal.artefacts(vault, cloud_id)
        task = task or self._default
        if task is None and len(names) == 1:
            return cloud_id, names[0]
        if task in names:
            return cloud_id, str(task)
        if not names:
            raise NotFound("there is no personal shift yet; `perfit update` trains one")
        if task is None:
            raise NotFound(f"there are several shifts; choose one with --task: {listed(names)}")
        raise NotFound(
            f'there is no personal shift for "{one_line(task)[:64]}"; there is one for {listed(names)}'
        )

    def usable(self, items: Iterable[HistoryItem], task: Task) -> list[HistoryItem]:
        """The examples that have the task's fields; `notify` gets how many lack one."""
        items = list(items)
        usable = history.usable(items, task)
        if len(usable) < len(items):
            self.notify(f"{len(items) - len(usable)} examples lack fields of {task.name} and are left out")
        return usable


def check_fields(task: Task, names: Iterable[str]) -> None:
    """Raises InvalidInput on a name that is no further field: beyond the one of the text and the answer's."""
    further = [name for name in task.field_names if name not in (task.text_field, task.gold_field)]
    if unknown := [name for name in names if name not in further]:
        raise InvalidInput(
            f'no further field "{one_line(unknown[0])[:64]}" in {task.name}; beside the text, its '
            f"{task.text_field}, it has {listed(further)}"
        )


def listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "none"
