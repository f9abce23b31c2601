"""`perfit-cloud invite`, `invites`, `devices`, `label`, `revoke`, `unrevoke`, `prune`: who may call.

A server runs on meanwhile.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from perfit_cloud.cli.common import ConfigFile, StateFolder, open_authority
from perfit_cloud.config import CloudConfig, load_config, parse_duration
from perfit_shared.errors import ConfigError

if TYPE_CHECKING:
    from perfit_cloud.service.identity.authority import Authority

__all__ = ["devices", "invite", "invites", "label", "opened", "prune", "revoke", "unrevoke"]

_MOST_INVITES = 1000
_ID = 12  # characters of an invite's id that are shown

Identity = Annotated[str, typer.Argument(help="The device's identity, or how it starts.")]


def invite(  # noqa: PLR0917 - options of a command
    count: Annotated[int, typer.Option(min=1, max=_MOST_INVITES, help="How many.")] = 1,
    life: Annotated[
        str | None, typer.Option(help='How long they can be used: seconds, or like "15m", "24h", "7d".')
    ] = None,
    label: Annotated[str, typer.Option(help="Your own words for who gets it; the device takes them.")] = "",
    config: ConfigFile = None,
    state: StateFolder = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
) -> None:
    """Print one-time invites, one a line. Hand each to one device, over a channel you trust.

    perfit-cloud invite --label "Ann's laptop"

    perfit-cloud invite --count 20 --life 7d --json
    """
    from perfit_cloud.service.state_folder import Addresses
    from perfit_shared.invites import Invite

    settings = load_config(file=config, flags={"state": state})
    seconds = settings.invite_seconds if life is None else parse_duration(life, "--life")
    address = settings.public_enrol_address or Addresses.load(settings.state).enrol_address
    with opened(settings) as authority:
        for _ in range(count):
            secret, expires = authority.invite(seconds, label)
            text = Invite(address, authority.server_ca_der, expires, secret).encode()
            print(json.dumps({"invite": text, "expires": expires}) if as_json else text)


def invites(
    revoke: Annotated[
        str | None, typer.Option(metavar="ID", help="Withdraw the open invite of this id, or how it starts.")
    ] = None,
    config: ConfigFile = None,
    state: StateFolder = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
) -> None:
    """List the invites that can still be used: id, end and label. An id is no secret.

    perfit-cloud invites

    perfit-cloud invites --revoke 3f9a02c1
    """
    with opened(load_config(file=config, flags={"state": state})) as authority:
        if revoke is not None:
            print(f"withdrew invite {authority.revoke_invite(revoke)[:_ID]}")
            return
        for found in authority.open_invites():
            id_ = found.secret_hash.hex()[:_ID]
            if as_json:
                print(json.dumps({"id": id_, "expires": found.expires, "label": found.label}))
            else:
                print(f"{id_}  until {_day(found.expires)}  {found.label}".rstrip())


def label(
    identity: Identity,
    text: Annotated[str, typer.Argument(help='Your own words; "" takes them away.')],
    config: ConfigFile = None,
    state: StateFolder = None,
) -> None:
    """Put words of your own to a device, for `perfit-cloud devices`. They stay in the state folder.

    perfit-cloud label 3f9a02c1 "Ann's laptop"
    """
    with opened(load_config(file=config, flags={"state": state})) as authority:
        print(f"labelled {authority.set_label(identity, text)}")


def revoke(identity: Identity, config: ConfigFile = None, state: StateFolder = None) -> None:
    """Withdraw a device's identity. A running server knows it within a second, for open calls too.

    perfit-cloud revoke 3f9a02c1
    """
    with opened(load_config(file=config, flags={"state": state})) as authority:
        print(f"revoked {authority.revoke(identity)}")


def unrevoke(identity: Identity, config: ConfigFile = None, state: StateFolder = None) -> None:
    """Welcome a device again that was revoked. It goes on with the certificate that it has.

    perfit-cloud unrevoke 3f9a02c1
    """
    with opened(load_config(file=config, flags={"state": state})) as authority:
        print(f"welcome again: {authority.restore(identity)}")


def devices(
    config: ConfigFile = None,
    state: StateFolder = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
) -> None:
    """List identities: when their newest certificate was issued and ends, and whether revoked.

    And when somebody last came with a certificate that a newer one had replaced: another process of the
    same device may do so once after a renewal; else two hold one identity, and it should be revoked.

    perfit-cloud devices --json
    """
    with opened(load_config(file=config, flags={"state": state})) as authority:
        for device in authority.devices():
            if as_json:
                print(json.dumps(asdict(device)))
            else:
                status = (
                    f"revoked {_day(device.revoked)}" if device.revoked else f"until {_day(device.expires)}"
                )
                if device.superseded:
                    status += f"  replaced certificate presented {_day(device.superseded)[:10]}"
                line = f"{device.identity}  issued {_day(device.issued)}  {status}  {device.label}"
                print(line.rstrip())


def prune(
    day: Annotated[
        datetime,
        typer.Option("--day", formats=["%Y-%m-%d"], metavar="YYYY-MM-DD", help="Today, or a day before."),
    ],
    config: ConfigFile = None,
    state: StateFolder = None,
) -> None:
    """Delete identities and invites that nobody could use any more on a day. Nothing else deletes any.

    The day is asked for because this machine's clock may be wrong.

    perfit-cloud prune --day 2026-11-28
    """
    with opened(load_config(file=config, flags={"state": state})) as authority:
        identities, ended = authority.prune(day.date())
        print(f"deleted {identities} identities and {ended} invites")


@contextlib.contextmanager
def opened(config: CloudConfig) -> Iterator[Authority]:
    """The authority of a state folder that is there. Raises ConfigError."""
    if not Path(config.state).is_dir():
        raise ConfigError(f"no state folder {config.state}; name the server's with --state")
    with contextlib.closing(open_authority(config)) as authority:
        yield authority


def _day(unix: int) -> str:
    return datetime.fromtimestamp(unix, UTC).strftime("%Y-%m-%d %H:%M")
