"""`perfit enroll`: an invite for a certificate."""

from __future__ import annotations

import contextlib
from dataclasses import asdict
from typing import Annotated

import typer

from perfit_device.cli.common import JsonFlag, ProfileOption, Session, say, show
from perfit_shared.errors import InvalidInvite, Unavailable
from perfit_shared.terminal import read_stdin


def enroll(
    context: typer.Context,
    invite: Annotated[
        str, typer.Argument(metavar="INVITE", help='The invite, or "-" to read it from stdin.')
    ],
    *,
    keyring: Annotated[
        bool, typer.Option("--keyring", help="Lock a new vault by the OS keyring, not by a passphrase.")
    ] = False,
    replace: Annotated[
        bool, typer.Option("--replace", help="Enrol anew; history and shifts of the profile stay.")
    ] = False,
    profile: ProfileOption = None,
    json: JsonFlag = False,
) -> None:
    """Enrol this device with a cloud.

    \b
    perfit enroll perfit1-AQAAA…
    pbpaste | perfit enroll -
    """
    session = Session.of(context, profile=profile, json=json)
    from perfit_device.cli.profiles import finish_removals
    from perfit_device.operations.enroll import Enroll
    from perfit_device.profile import Profile
    from perfit_shared.invites import Invite

    operation = Enroll(_read(invite), replace=replace)
    Invite.decode(operation.invite).check_expiry()
    settings = session.settings
    if settings.vault_path.exists():
        done = session.perform(operation)
    else:
        finish_removals(settings)
        new = None if keyring else session.new_passphrase()
        with Profile.create(settings, passphrase=new, notify=say) as created:
            done = created.perform(operation, show)
        if new is not None and not settings.has_passphrase and settings.starts_agent:
            with contextlib.suppress(Unavailable, OSError):  # the next command tries again
                session.start_agent(new)
    if session.json:
        session.emit(asdict(done))
    else:
        tasks = f"; its tasks: {', '.join(done.tasks)}" if done.tasks else ""
        say(f"enrolled with {done.address}{tasks}")


def _read(invite: str) -> str:
    if invite != "-":
        return invite
    text = read_stdin(64 * 1024)
    if not text.strip():
        raise InvalidInvite("stdin held no invite; paste it and end with Ctrl-D")
    return text
