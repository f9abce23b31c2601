"""`perfit-cloud invite`, `revoke`, `devices` and `prune`: who may call. A server runs on meanwhile."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from perfit_cloud.cli.common import open_authority
from perfit_cloud.cli.serve import ConfigFile, StateFolder
from perfit_cloud.config import CloudConfig, load_config, parse_duration
from perfit_shared.errors import ConfigError

if TYPE_CHECKING:
    from perfit_cloud.service.identity.authority import Authority

__all__ = ["devices", "invite", "prune", "revoke"]

_MOST_INVITES = 1000


def invite(
    count: Annotated[int, typer.Option(min=1, max=_MOST_INVITES, help="How many.")] = 1,
    life: Annotated[
        str | None, typer.Option(help='How long they can be used: seconds, or like "15m", "24h", "7d".')
    ] = None,
    config: ConfigFile = None,
    state: StateFolder = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
) -> None:
    """Print one-time invites, one a line. Hand each to one device, over a channel you trust.

    perfit-cloud invite

    perfit-cloud invite --count 20 --life 7d --json
    """
    from perfit_cloud.service.state_folder import Addresses
    from perfit_shared.invites import Invite

    settings = load_config(file=config, flags={"state": state})
    seconds = settings.invite_seconds if life is None else parse_duration(life, "--life")
    address = settings.public_enrol_address or Addresses.load(settings.state).enrol_address
    with _opened(settings) as authority:
        for _ in range(count):
            secret, expires = authority.invite(seconds)
            text = Invite(address, authority.server_ca_der, expires, secret).encode()
            print(json.dumps({"invite": text, "expires": expires}) if as_json else text)


def revoke(
    identity: Annotated[str, typer.Argument(help="The device's identity, or how it starts.")],
    config: ConfigFile = None,
    state: StateFolder = None,
) -> None:
    """Withdraw a device's identity. A running server knows it within a second, for open calls too.

    perfit-cloud revoke 3f9a02c1
    """
    with _opened(load_config(file=config, flags={"state": state})) as authority:
        print(f"revoked {authority.revoke(identity)}")


def devices(
    config: ConfigFile = None,
    state: StateFolder = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
) -> None:
    """List identities: when their newest certificate was issued and ends, and whether revoked.

    And when somebody last came with a certificate that a newer one had replaced: another process of the
    same device may do so once after a renewal; else two hold one identity, and it should be revoked.
    """
    with _opened(load_config(file=config, flags={"state": state})) as authority:
        for device in authority.devices():
            if as_json:
                print(json.dumps(asdict(device)))
            else:
                status = (
                    f"revoked {_day(device.revoked)}" if device.revoked else f"until {_day(device.expires)}"
                )
                if device.superseded:
                    status += f"  replaced certificate presented {_day(device.superseded)[:10]}"
                print(f"{device.identity}  issued {_day(device.issued)}  {status}")


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
    with _opened(load_config(file=config, flags={"state": state})) as authority:
        identities, invites = authority.prune(day.date())
        print(f"deleted {identities} identities and {invites} invites")


@contextlib.contextmanager
def _opened(config: CloudConfig) -> Iterator[Authority]:
    if not Path(config.state).is_dir():
        raise ConfigError(f"no state folder {config.state}; name the server's with --state")
    with contextlib.closing(open_authority(config)) as authority:
        yield authority


def _day(unix: int) -> str:
    return datetime.fromtimestamp(unix, UTC).strftime("%Y-%m-%d %H:%M")
