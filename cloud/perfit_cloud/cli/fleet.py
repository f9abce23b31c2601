"""`perfit-cloud server`, `rotate` and `migrate-state`: for a cloud that grows, and one that grows old."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated

import typer

from perfit_cloud.cli.authority import opened
from perfit_cloud.cli.common import ConfigFile, StateFolder
from perfit_cloud.config import load_config
from perfit_shared.errors import ConfigError, InvalidInput
from perfit_shared.ownership import make_private_folder

__all__ = ["migrate_state", "rotate", "server"]


def server(
    names: Annotated[
        list[str], typer.Argument(help="Host names and IPs that devices dial to reach it, a balancer's too.")
    ],
    out: Annotated[Path, typer.Option(help="New folder for its files: its --state, over there.")],
    config: ConfigFile = None,
    state: StateFolder = None,
    as_json: Annotated[bool, typer.Option("--json", help="The identity as JSON.")] = False,
) -> None:
    """Make the files that a server of this cloud begins with, which has not the role enrolment.

    Carry the folder there over a way that you trust; its key opens no other cloud, and every hour the server
    replaces it. `perfit-cloud devices` lists it, and once it is revoked it renews no more.

    perfit-cloud server cloud.example.com --out replica1

    perfit-cloud serve --roles answers,updates --state replica1
    """
    settings = load_config(file=config, flags={"state": state})
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"{out} holds something; name a folder that is not there yet")
    with opened(settings) as authority:
        make_private_folder(out)
        identity = authority.write_serving_files(out, [*names, "localhost", "127.0.0.1", "::1"])
    said = {"identity": identity, "folder": str(out)}
    print(json.dumps(said) if as_json else f"server {identity}: its files are in {out}")


def rotate(
    step: Annotated[
        str, typer.Argument(metavar="[begin|switch|finish]", help="The next step; without it: how it stands.")
    ] = "",
    now: Annotated[
        bool,
        typer.Option("--now", help="Even if some have not renewed since the last step: they enrol anew."),
    ] = False,
    config: ConfigFile = None,
    state: StateFolder = None,
    as_json: Annotated[bool, typer.Option("--json", help="How it stands, as JSON.")] = False,
) -> None:
    """Replace both authorities, step by step, while everybody stays enrolled.

    begin makes the next ones, and whoever renews from now on trusts both; switch lets them sign, and deletes
    the old keys; finish ends the trust in the old ones. A step waits until all have renewed since the last:
    at most a certificate's life and the time for which a lapsed one may be renewed. Invites that are open at
    switch have to be made anew.

    perfit-cloud rotate

    perfit-cloud rotate begin
    """
    if step not in ("", "begin", "switch", "finish"):
        raise InvalidInput(f'"{step[:20]}" is no step; there are begin, switch and finish')
    with opened(load_config(file=config, flags={"state": state})) as authority:
        found = authority.rotation.take(step, now=now) if step else authority.rotation.state()
        stale = len(authority.open_invites()) if step == "switch" else 0
    if as_json:
        waits_for = [device.identity for device in found.waits_for]
        print(json.dumps({"step": found.step, "at": found.at, "next": found.next, "waits_for": waits_for}))
        return
    when = f" on {time.strftime('%Y-%m-%d %H:%M', time.gmtime(found.at))} UTC" if found.at else ""
    print(f"{found.step}{when}; next: {found.next}, which waits for {len(found.waits_for)} to renew")
    if stale:
        print(f"{stale} open invites name the old authority; withdraw them, and make them anew")


def migrate_state(
    database: Annotated[
        str, typer.Argument(help="An empty PostgreSQL, like postgresql://user@host/name; no password in it.")
    ],
    config: ConfigFile = None,
    state: StateFolder = None,
    as_json: Annotated[bool, typer.Option("--json", help="The rows moved, as JSON.")] = False,
) -> None:
    """Move invites, devices and revocations from the state folder into PostgreSQL. Stop the server first.

    The keys of the authorities stay in the folder. A password belongs into the file of PGPASSFILE.

    perfit-cloud migrate-state postgresql://perfit@db.example.com/perfit
    """
    from perfit_cloud.service.state_folder import check_state

    settings = load_config(file=config, flags={"state": state})
    try:
        from perfit_cloud.service.identity.migration import move
    except ImportError:
        raise ConfigError("a database needs the fleet extra: pip install 'perfit[fleet]'") from None
    check_state(settings.state, trusts_group=settings.state_writers == "group")
    moved = move(settings.state, database)
    if as_json:
        print(json.dumps(moved))
    else:
        print(f"moved {moved['devices']} devices and {moved['invites']} invites; next: set `database` to it")
