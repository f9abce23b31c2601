"""What the commands share: their common options, the profile that they open, and how they speak.

Heavy modules (numpy, grpc, cryptography) are imported by the functions that need them, so that
`perfit --help` answers at once.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from perfit_device.cli.prompts import ask_passphrase
from perfit_device.settings import DeviceSettings
from perfit_shared.errors import InvalidInput
from perfit_shared.terminal import one_line

if TYPE_CHECKING:
    from perfit_device.profile import Profile

__all__ = ["FieldsOption", "JsonFlag", "ProfileOption", "Session", "TaskOption", "fields_of", "say"]

JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]
ProfileOption = Annotated[
    str | None,
    typer.Option(
        "--profile", metavar="NAME", help="Which profile to use.  [default: PERFIT_PROFILE, or default]"
    ),
]
FieldsOption = Annotated[
    list[str] | None,
    typer.Option("--field", metavar="NAME=TEXT", help="Another field of the task; may be given again."),
]
TaskOption = Annotated[
    str | None,
    typer.Option(
        "--task", metavar="NAME", help="Which of the cloud's artefacts; needed when it has several."
    ),
]


def say(text: str) -> None:
    """One line for a person, on stderr."""
    print(text, file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Session:
    """One command's options. They may stand before or after the command's name."""

    profile: str | None = None
    json: bool = False

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

    def passphrase(self, prompt: str = "Passphrase", *, confirm: bool = False) -> str:
        """From PERFIT_PASSPHRASE, else asked for on a terminal. Raises ConfigError without either."""
        given = self.settings.passphrase()
        return given if given is not None else ask_passphrase(prompt, confirm=confirm)

    def open_profile(self, notify: Callable[[str], None] = say) -> Profile:
        """Raises as `Profile.open` does."""
        from perfit_device.profile import Profile

        return Profile.open(self.settings, passphrase=self.passphrase, notify=notify)


def fields_of(given: list[str] | None) -> dict[str, str]:
    """What --field says. Raises InvalidInput on anything but NAME=TEXT, each name once."""
    fields: dict[str, str] = {}
    for text in given or []:
        name, equals, value = text.partition("=")
        if not (name and equals) or name in fields:
            raise InvalidInput(f'--field "{one_line(text)[:64]}" should be NAME=TEXT, each name once')
        fields[name] = value
    return fields
