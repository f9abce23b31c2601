"""`perfit enroll`: an invite for a certificate."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from perfit_device.cli.common import (
    JsonFlag,
    ProfileOption,
    Session,
    read_enrolment,
    remember,
    say,
    while_opening,
    write_enrolment,
)
from perfit_shared.errors import InvalidInvite, PerfitError
from perfit_shared.terminal import read_stdin

if TYPE_CHECKING:
    from perfit_device.vault.store import Vault
    from perfit_shared.invites import Invite

_PENDING = ("identity", "pending")


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
    from perfit_device.vault.store import Vault
    from perfit_shared.invites import Invite

    opened = Invite.decode(_read(invite))
    enrolments.check_expiry(opened)
    path = session.settings.vault_path
    if path.exists():
        vault = session.open_vault()
    else:
        new = None if keyring else session.passphrase("A new passphrase for this device", confirm=True)
        vault = Vault.create(path, new)
    with vault:
        _enroll(session, vault, opened, replace=replace)


def _read(invite: str) -> str:
    if invite != "-":
        return invite
    text = read_stdin(64 * 1024)
    if not text.strip():
        raise InvalidInvite("stdin held no invite; paste it and end with Ctrl-D")
    return text


def _enroll(session: Session, vault: Vault, invite: Invite, *, replace: bool) -> None:
    """The key is sealed before the call and kept until its answer: when the answer is lost, the
    same invite with the same key gets it again. Of an invite that was answered the digest stays, so
    that the same command does no harm: the cloud takes no invite again once its certificate was used."""
    import hashlib
    import hmac

    from perfit_device.cloud import enrolment as enrolments
    from perfit_device.cloud.client import Cloud
    from perfit_device.cloud.identity import Identity

    used = hashlib.sha256(invite.secret).digest()
    pending = vault.get(*_PENDING)
    known = read_enrolment(vault)
    same = pending is not None and hmac.compare_digest(pending[:32], used)
    if known is not None and not replace and not same:
        raise InvalidInvite(
            f'the profile "{session.settings.profile}" is enrolled with {known.address} already; '
            "use --profile NAME for another cloud, or --replace to enrol this one anew"
        )
    if known is not None and pending == used and not replace:
        enrolment = known
    else:
        key = pending[32:] if pending is not None and same else b""
        identity = Identity.from_der(key) if key else Identity.create()
        if not key:
            vault.put(*_PENDING, used + identity.to_der())
        enrolment = while_opening().call(lambda: enrolments.enroll(invite, identity))
        with vault.transaction():
            write_enrolment(vault, enrolment)
            vault.put(*_PENDING, used)
    tasks: list[str] = []
    try:
        with Cloud(enrolment, on_renewed=lambda new: write_enrolment(vault, new)) as cloud:
            info = cloud.describe()
        remember(vault, info)
        tasks = [artefact.name for artefact in info.artefacts]
    except PerfitError as error:
        say(f"enrolled, but the cloud cannot be asked yet: {error}")
    if session.json:
        session.emit(
            {
                "profile": session.settings.profile,
                "address": enrolment.address,
                "cloud_id": enrolment.cloud_id,
                "tasks": tasks,
            }
        )
    else:
        say(f"enrolled with {enrolment.address}" + (f"; its tasks: {', '.join(tasks)}" if tasks else ""))
