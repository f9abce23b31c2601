"""What the commands share: their common options, the profile that they open, and how they speak.

Heavy modules (numpy, grpc, cryptography) are imported by the functions that need them, so that
`perfit --help` answers at once.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from perfit_device.cli import prompts
from perfit_device.cli.prompts import ask_passphrase
from perfit_device.settings import DeviceSettings
from perfit_shared.errors import Busy, InvalidInput, Locked, Unavailable
from perfit_shared.terminal import one_line

if TYPE_CHECKING:
    from perfit_device.agent.client import AgentClient
    from perfit_device.operations.operation import Emit, Event, Operation, Performer
    from perfit_device.profile import Profile

__all__ = [
    "FieldsOption",
    "FrequencyPenaltyOption",
    "JsonFlag",
    "PresencePenaltyOption",
    "ProfileOption",
    "Session",
    "TaskOption",
    "fields_of",
    "say",
    "show",
]

Result = TypeVar("Result")


def _profiles() -> list[str]:
    """For completion in a shell, as the next one: known without the vault."""
    return DeviceSettings.from_environment(None).profiles()


def _tasks() -> list[str]:
    from perfit_shared.tasks import TASKS

    return list(TASKS)


FrequencyPenaltyOption = Annotated[
    float | None,
    typer.Option(
        "--frequency-penalty",
        help="-2 to 2: how much rarer a token becomes each time it is used.  [default: the task's]",
    ),
]
PresencePenaltyOption = Annotated[
    float | None,
    typer.Option(
        "--presence-penalty",
        help="-2 to 2: how much rarer a token becomes once it is used.  [default: the task's]",
    ),
]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]
ProfileOption = Annotated[
    str | None,
    typer.Option(
        "--profile",
        metavar="NAME",
        help="Which profile to use.  [default: PERFIT_PROFILE, or default]",
        autocompletion=_profiles,
    ),
]
FieldsOption = Annotated[
    list[str] | None,
    typer.Option("--field", metavar="NAME=TEXT", help="Another field of the task; may be given again."),
]
TaskOption = Annotated[
    str | None,
    typer.Option(
        "--task",
        metavar="NAME",
        help="Which of the cloud's artefacts; needed where several could be meant.",
        autocompletion=_tasks,
    ),
]


def say(text: str) -> None:
    """One line for a person, on stderr."""
    print(text, file=sys.stderr, flush=True)


def show(event: Event) -> None:
    """A note on stderr; other events are for commands that know them."""
    if text := getattr(event, "text", None):
        say(text)


@dataclass(frozen=True)
class Session:
    """One command's options. They may stand before or after the command's name."""

    profile: str | None = None
    json: bool = False
    _given: list[str] = field(
        default_factory=list, repr=False, compare=False
    )  # the passphrase, once it is known

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

    def passphrase(self) -> str:
        """From the environment, else asked for on a terminal, once. Raises ConfigError without either."""
        if not self._given:
            given = self.settings.passphrase()
            self._given.append(ask_passphrase("Passphrase") if given is None else given)
        return self._given[0]

    def new_passphrase(self) -> str:
        """For a new profile."""
        given = self.settings.passphrase()
        if given is not None:
            return given
        return ask_passphrase("A new passphrase for this device", confirm=True)

    @contextlib.contextmanager
    def performer(self) -> Iterator[Performer]:
        """Whoever holds the profile: its agent where one answers, else this process.

        A passphrase that is typed starts the agent, so that it need not be typed again. A locked agent is
        unlocked by it; where the environment has a passphrase, it stays locked, and this process opens the
        profile. Raises as `Profile.open` does, and Locked.
        """
        from perfit_device.agent.client import connect

        settings = self.settings
        settings.check_exists()
        agent = connect(settings)
        if agent is not None and agent.hello.is_locked:
            agent = self._unlocked(agent)
        if agent is None and settings.starts_agent and prompts.has_terminal():
            agent = self._started()
        with agent or self._opened() as performer:
            yield performer

    def perform(self, operation: Operation[Result], emit: Emit | None = None) -> Result:
        """One operation. `emit` gets what happens meanwhile; without it notes go to stderr."""
        with self.performer() as performer:
            return performer.perform(operation, emit or show)

    def _opened(self) -> Profile:
        from perfit_device.profile import Profile

        return Profile.open(self.settings, passphrase=self.passphrase, notify=say)

    def _unlocked(self, agent: AgentClient) -> AgentClient | None:
        """None where this process should open the profile."""
        from perfit_device.agent.controls import Unlock

        needs_passphrase = agent.hello.lock == "passphrase"
        if needs_passphrase and self.settings.has_passphrase:
            agent.close()
            return None
        if not needs_passphrase or not prompts.has_terminal():
            raise Locked("the profile is locked; `perfit unlock` opens it")
        agent.perform(Unlock(self.passphrase().encode()))
        return agent

    def _started(self) -> AgentClient | None:
        """An agent with what is typed; None where nothing is to be typed, or none can run here."""
        settings = self.settings
        if settings.has_passphrase or self.vault_lock() != "passphrase":
            return None
        passphrase = self.passphrase()
        try:
            return self.start_agent(passphrase)
        except (Unavailable, OSError) as error:
            say(f"{error}; this command opens the profile by itself")
            return None

    def vault_lock(self) -> str:
        """ "passphrase" or "keyring", of a vault that nobody holds."""
        from perfit_device.vault.store import Vault

        return Vault.lock_of(self.settings.vault_path, costly=self.settings.costly_vault)

    def start_agent(self, passphrase: str | None, *, unlock: str = "stdin") -> AgentClient | None:
        """Raises WrongPassphrase, and Unavailable where none can run."""
        from perfit_device.agent.client import connect
        from perfit_device.agent.launch import start

        with contextlib.suppress(Busy):  # another command has started it just now
            start(self.settings, passphrase, unlock=unlock)
        return connect(self.settings)


def fields_of(given: list[str] | None) -> dict[str, str]:
    """What --field says. Raises InvalidInput on anything but NAME=TEXT, each name once."""
    fields: dict[str, str] = {}
    for text in given or []:
        name, equals, value = text.partition("=")
        if not (name and equals) or name in fields:
            raise InvalidInput(f'--field "{one_line(text)[:64]}" should be NAME=TEXT, each name once')
        fields[name] = value
    return fields
