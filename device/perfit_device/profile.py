"""One profile of this device, opened: its vault, its cloud, its artefacts.

What a profile can do stands in `operations`, a file for each; they take a `Profile` and give values. The
command line parses, asks and prints around them.

    with Profile.open(DeviceSettings("default"), passphrase=ask) as profile:
        prepared = prepare(profile, Question("The council met until dawn."), [Mode.PERSONAL])
        for chunk in prepared.stream(Mode.PERSONAL): …

Nothing here prints or prompts: it calls `passphrase` when the vault needs one, and `notify` with lines for
a person. Heavy modules are imported where they are needed, so that what works offline loads no gRPC.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

from perfit_device import personal
from perfit_device.cloud.retry import RetryPolicy
from perfit_device.cloud_record import read_enrolment, read_record, write_enrolment, write_record
from perfit_device.settings import DeviceSettings
from perfit_device.vault.store import Vault
from perfit_shared.errors import InvalidInput, NotAuthenticated, NotFound, Unavailable, VaultBusy
from perfit_shared.tasks import TASKS, Task
from perfit_shared.terminal import one_line

if TYPE_CHECKING:
    from perfit_device.cloud.client import Cloud
    from perfit_device.cloud.codec import Artefact, CloudInfo
    from perfit_device.cloud.identity import Enrolment
    from perfit_device.history import HistoryItem

__all__ = ["OPENING_SECONDS", "Profile", "check_fields", "listed"]

OPENING_SECONDS = 10.0  # that the first calls wait for a cloud that is away


class Profile:
    """An open profile; `open` or `create` one, and use `with`.

    Several threads may share it. A caller with a long call ahead may `release_vault`, so that other
    processes can use the vault meanwhile.
    """

    def __init__(
        self, settings: DeviceSettings, vault: Vault, passphrase: str | None, notify: Callable[[str], None]
    ) -> None:
        self.settings = settings
        self.notify = notify
        self._vault = vault
        self._passphrase = passphrase  # reopens a released vault without another prompt
        self._using = threading.RLock()  # of the next three, and while the vault is opened or closed
        self._users = 0
        self._is_released = False
        self._connecting = threading.Lock()
        self._connected: tuple[Cloud, CloudInfo] | None = None

    # -- opening and closing -------------------------------------------------------------------

    @classmethod
    def open(
        cls,
        settings: DeviceSettings,
        *,
        passphrase: Callable[[], str],
        notify: Callable[[str], None] = lambda _: None,
    ) -> Profile:
        """Raises NotFound, VaultBusy, WrongPassphrase or VaultDamaged."""
        path, costly = settings.vault_path, settings.costly_vault
        if not path.exists():
            raise NotFound(
                f'there is no profile "{settings.profile}"; `perfit enroll INVITE` makes one, '
                "--profile chooses another, and `perfit profiles` lists them"
            )
        given = passphrase() if Vault.lock_of(path, costly=costly) == "passphrase" else None
        return cls(settings, Vault.open(path, given, costly=costly), given, notify)

    @classmethod
    def create(
        cls,
        settings: DeviceSettings,
        *,
        passphrase: str | None,
        notify: Callable[[str], None] = lambda _: None,
    ) -> Profile:
        """A new profile, locked by `passphrase`, or by the OS keyring where it is None."""
        return cls(settings, Vault.create(settings.vault_path, passphrase), passphrase, notify)

    def close(self) -> None:
        """Ends every call in flight."""
        if self._connected is not None:
            self._connected[0].close()
        self.release_vault()

    def __enter__(self) -> Profile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

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
        path, costly = self.settings.vault_path, self.settings.costly_vault
        try:
            return Vault.open(path, self._passphrase, costly=costly)
        except VaultBusy as error:
            raise Unavailable(str(error)) from error

    def _close_unused(self) -> None:
        if self._is_released and not self._users:
            self._vault.close()

    def change_passphrase(self, new: str) -> None:
        with self.vault() as vault:
            vault.change_passphrase(new)
        self._passphrase = new

    def release_vault(self) -> None:
        """Let other processes have it, as soon as no thread uses it."""
        with self._using:
            self._is_released = True
            self._close_unused()

    # -- the cloud -----------------------------------------------------------------------------

    def connect(self, retry_policy: RetryPolicy | None = None) -> tuple[Cloud, CloudInfo]:
        """The profile's cloud, and what it serves; one connection as long as the profile is open.

        The default policy is that of `while_opening`. Raises NotAuthenticated when the profile is not
        enrolled.
        """
        with self._connecting:
            if self._connected is None:
                self._connected = self._connect(retry_policy or self.while_opening())
            return self._connected

    def while_opening(self) -> RetryPolicy:
        """For first calls: a person waits for them, so `notify` says why they take longer."""
        return RetryPolicy(give_up=OPENING_SECONDS, notify=self.notify)

    def _connect(self, retry_policy: RetryPolicy) -> tuple[Cloud, CloudInfo]:
        cloud, info = retry_policy.call(self._connector())
        try:
            if info.cloud_id != cloud.enrolment.cloud_id:
                raise NotAuthenticated(
                    f"the server at {cloud.address} is another cloud than the one this profile "
                    "is enrolled with; ask the operator for a new invite"
                )
            with self.vault() as vault:
                write_record(vault, info)
            return cloud, info
        except BaseException:
            cloud.close()
            raise

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
            cloud = Cloud(enrolment, on_renewed=save, reload_enrolment=self._enrolment)
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
        """The cloud's artefact of that name; else the only one, or the only one this user has a shift for."""
        _, info = self.connect()
        by_name = {artefact.name: artefact for artefact in info.artefacts}
        if task is None:
            return by_name[self._default_task(by_name, info.cloud_id)]
        if task not in by_name:
            raise NotFound(f'the cloud has no task "{one_line(task)[:64]}"; it has {listed(by_name)}')
        return by_name[task]

    def task(self, name: str | None) -> Task:
        """A task by name, as the cloud last described it; offline, and before enrolment too."""
        with self.vault() as vault:
            record = read_record(vault)
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

    def _default_task(self, names: Iterable[str], cloud_id: str) -> str:
        names = list(names)
        if not names:
            raise NotFound("the cloud serves no artefact; ask its operator")
        with self.vault() as vault:
            mine = [name for name in names if name in personal.artefacts(vault, cloud_id)]
        if len(names) > 1 and len(mine) != 1:
            raise NotFound(f"the cloud has several tasks; choose one with --task: {listed(names)}")
        return names[0] if len(names) == 1 else mine[0]

    def trained(self, task: str | None) -> tuple[str, str]:
        """(cloud id, artefact) of the personal shift that is meant. Works offline."""
        with self.vault() as vault:
            cloud_id = read_record(vault).cloud_id
            names = personal.artefacts(vault, cloud_id)
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
        from perfit_device import history

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
