"""What the commands share: the profile at hand, its vault and its cloud, and how they speak.

Heavy modules (numpy, grpc, cryptography) are imported by the functions that need them, so that
`perfit --help` answers at once.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import typer

from perfit_device.cli.prompts import ask_passphrase
from perfit_device.settings import DeviceSettings
from perfit_shared.errors import NotAuthenticated, NotFound, Unavailable, VaultBusy
from perfit_shared.terminal import one_line

if TYPE_CHECKING:
    from perfit_device.cloud.client import Cloud
    from perfit_device.cloud.codec import Artefact, CloudInfo
    from perfit_device.cloud.identity import Enrolment
    from perfit_device.cloud.retry import RetryPolicy
    from perfit_device.history import HistoryItem
    from perfit_device.vault.store import Vault
    from perfit_shared.tasks import Task

__all__ = ["JsonFlag", "ProfileOption", "Session", "TaskOption", "say", "while_opening"]

JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]
ProfileOption = Annotated[
    str | None,
    typer.Option(
        "--profile", metavar="NAME", help="Which profile to use.  [default: PERFIT_PROFILE, or default]"
    ),
]
TaskOption = Annotated[
    str | None,
    typer.Option(
        "--task", metavar="NAME", help="Which of the cloud's artefacts; needed when it has several."
    ),
]

_OPENING_SECONDS = 10.0
_INFO_PLACE = ("cloud", "describe")
_ENROLMENT_PLACE = ("identity", "current")


def say(text: str) -> None:
    """One line for a person, on stderr."""
    print(text, file=sys.stderr, flush=True)


@dataclass
class Session:
    """One command's profile. Options may stand before or after the command's name."""

    profile: str | None = None
    json: bool = False
    _opened_with: str | None = field(default=None, init=False, repr=False)  # passphrase of the vault

    @classmethod
    def of(cls, context: typer.Context, *, profile: str | None = None, json: bool = False) -> Session:
        """The global options, overridden by the command's own."""
        above = context.find_object(Session) or cls()
        return cls(profile=profile or above.profile, json=json or above.json)

    @property
    def settings(self) -> DeviceSettings:
        return DeviceSettings.from_environment(self.profile)

    def emit(self, value: Any) -> None:
        """JSON on stdout; ASCII, so that no character of it steers a terminal."""
        print(json.dumps(value), flush=True)

    # -- the vault -----------------------------------------------------------------------------

    def passphrase(self, prompt: str = "Passphrase", *, confirm: bool = False) -> str:
        """From PERFIT_PASSPHRASE, else asked for on a terminal. Raises ConfigError without either."""
        given = self.settings.passphrase()
        if given is not None:
            return given
        return ask_passphrase(prompt, confirm=confirm)

    def open_vault(self) -> Vault:
        """Raises NotFound, VaultBusy, WrongPassphrase or VaultDamaged."""
        from perfit_device.vault.store import Vault

        path = self.settings.vault_path
        if not path.exists():
            raise NotFound(
                f'there is no profile "{self.settings.profile}"; `perfit enroll INVITE` makes one, '
                "--profile chooses another, and `perfit profiles` lists them"
            )
        costly = self.settings.costly_vault
        passphrase = self._opened_with
        if passphrase is None and Vault.lock_of(path, costly=costly) == "passphrase":
            passphrase = self.passphrase()
        vault = Vault.open(path, passphrase, costly=costly)
        self._opened_with = passphrase  # nobody may be there to type it again in mid-run
        return vault

    # -- the cloud -----------------------------------------------------------------------------

    @contextlib.contextmanager
    def open_cloud(
        self, vault: Vault, retry_policy: RetryPolicy | None = None
    ) -> Iterator[tuple[Cloud, CloudInfo]]:
        """The profile's cloud, described. Raises NotAuthenticated when it is not enrolled.

        `patience` is `while_opening` unless said otherwise. A long call may close the vault first, so
        that other commands of the profile can run.
        """
        from perfit_device.cloud.client import Cloud

        enrolment = read_enrolment(vault)
        if enrolment is None:
            raise NotAuthenticated(
                f'the profile "{self.settings.profile}" is not enrolled; `perfit enroll INVITE` does it'
            )

        def keep(new: Enrolment) -> None:
            nonlocal enrolment  # for the next try: this one may have been used, which retired the old one
            with self._held(vault) as held:
                write_enrolment(held, new)
            enrolment = new

        def read_anew() -> Enrolment | None:
            with self._held(vault) as held:
                return read_enrolment(held)

        def connect() -> tuple[Cloud, CloudInfo]:
            cloud = Cloud(enrolment, on_renewed=keep, read_anew=read_anew)
            try:
                return cloud, cloud.describe()
            except BaseException:
                cloud.close()
                raise

        cloud, info = (retry_policy or while_opening()).call(connect)
        with cloud:
            if info.cloud_id != enrolment.cloud_id:
                raise NotAuthenticated(
                    f"the server at {enrolment.address} is another cloud than the one this profile "
                    "is enrolled with; ask the operator for a new invite"
                )
            remember(vault, info)
            yield cloud, info

    @contextlib.contextmanager
    def _held(self, vault: Vault) -> Iterator[Vault]:
        """The vault; opened anew for a moment, when it was released already.

        Raises Unavailable while another command holds it: the call that needs it can be tried again.
        """
        if not vault.closed:
            yield vault
            return
        try:
            again = self.open_vault()
        except VaultBusy as error:
            raise Unavailable(str(error)) from error
        with again:
            yield again

    def artefact(self, info: CloudInfo, vault: Vault, task: str | None) -> Artefact:
        """The one asked for; else the only one, or the only one this user has a shift for."""
        by_name = {artefact.name: artefact for artefact in info.artefacts}
        if task is not None:
            if task not in by_name:
                raise NotFound(f'the cloud has no task "{one_line(task)[:64]}"; it has {listed(by_name)}')
            return by_name[task]
        return by_name[self._default_task(list(by_name), info.cloud_id, vault)]

    def task(self, vault: Vault, name: str | None) -> Task:
        """A task by name, as the cloud last described it; offline, and before enrolment too."""
        from perfit_shared.tasks import Task, task_named

        known = recall(vault)
        if name is None:
            if not known.tasks:
                raise NotFound("say which task the examples are of, with --task NAME")
            name = self._default_task(list(known.tasks), known.cloud_id, vault)
        if name in known.tasks:
            return Task.from_json(known.tasks[name])
        if known.tasks:
            raise NotFound(f'the cloud has no task "{one_line(name)[:64]}"; it has {listed(known.tasks)}')
        return task_named(name)

    def _default_task(self, names: list[str], cloud_id: str, vault: Vault) -> str:
        if len(names) == 1:
            return names[0]
        if not names:
            raise NotFound("the cloud serves no artefact; ask its operator")
        from perfit_device import personal

        mine = [name for name in names if vault.has("shift", personal.row_name(cloud_id, name))]
        if len(mine) != 1:
            raise NotFound(f"the cloud has several tasks; choose one with --task: {listed(names)}")
        return mine[0]


def usable_items(items: Sequence[HistoryItem], task: Task) -> list[HistoryItem]:
    """The examples that have the task's fields; how many have not is said."""
    from perfit_device import history

    usable = history.usable(items, task)
    if len(usable) < len(items):
        say(f"{len(items) - len(usable)} examples lack fields of {task.name} and are left out")
    return usable


def while_opening() -> RetryPolicy:
    """For the first calls of a command: somebody waits for it, and is told why it takes longer."""
    from perfit_device.cloud.retry import RetryPolicy

    return RetryPolicy(give_up=_OPENING_SECONDS, tell=say)


def read_enrolment(vault: Vault) -> Enrolment | None:
    from perfit_device.cloud.identity import Enrolment

    data = vault.get(*_ENROLMENT_PLACE)
    return None if data is None else Enrolment.from_bytes(data)


def write_enrolment(vault: Vault, enrolment: Enrolment) -> None:
    vault.put(*_ENROLMENT_PLACE, enrolment.to_bytes())


@dataclass(frozen=True)
class Known:
    """What the cloud said last of what it serves, for offline use; empty before it was first asked."""

    cloud_id: str = ""
    tasks: Mapping[str, str] = field(default_factory=dict)  # artefact name → task JSON
    prompt_tokens: int = 0  # longest prompt; 0: not known
    new_tokens: int = 0  # longest answer

    def task_of(self, name: str) -> str:
        """The task of an artefact, else the name itself."""
        return str(json.loads(self.tasks[name])["name"]) if name in self.tasks else name

    @property
    def by_task(self) -> dict[str, Task]:
        """The tasks of the artefacts, by their own names."""
        from perfit_shared.tasks import Task

        return {task.name: task for task in map(Task.from_json, self.tasks.values())}


def remember(vault: Vault, info: CloudInfo) -> None:
    """Keep what the cloud serves, so that history can be sorted offline."""
    data = json.dumps(
        {
            "cloud_id": info.cloud_id,
            "base_model": info.base_model,
            "tasks": {artefact.name: artefact.task.to_json() for artefact in info.artefacts},
            "prompt_tokens": info.limits.prompt_tokens,
            "new_tokens": info.limits.new_tokens,
        }
    ).encode()
    if vault.get(*_INFO_PLACE) != data:
        vault.put(*_INFO_PLACE, data)


def recall(vault: Vault) -> Known:
    data = vault.get(*_INFO_PLACE)
    if data is None:
        return Known()
    values = json.loads(data)
    del values["base_model"]
    return Known(**values)


def listed(names: Any) -> str:
    return ", ".join(sorted(names)) or "none"
