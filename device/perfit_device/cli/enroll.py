"""`perfit enroll`: an invite for a certificate."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from perfit_device.cli.common import JsonFlag, ProfileOption, Session, say
from perfit_shared.errors import InvalidInvite
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
    from perfit_device.cloud import enrolment as enrolments
    from perfit_device.operations import enroll as operation
    from perfit_device.profile import Profile
    from perfit_shared.invites import Invite

    opened_invite = Invite.decode(_read(invite))
    enrolments.check_expiry(opened_invite)
    if session.settings.vault_path.exists():
        opened = session.open_profile()
    else:
        new = None if keyring else session.passphrase("A new passphrase for this device", confirm=True)
        opened = Profile.create(session.settings, passphrase=new, notify=say)
    with opened:
        done = operation.enroll(opened, opened_invite, replace=replace)
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
