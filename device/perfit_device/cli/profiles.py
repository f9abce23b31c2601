"""`perfit profiles`: which there are, which one commands use, and removing one."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import typer

from perfit_device.cli.common import JsonFlag, Session, say
from perfit_device.cli.prompts import require_yes
from perfit_device.config import Config
from perfit_device.settings import DeviceSettings
from perfit_shared.errors import NotFound

app = typer.Typer(invoke_without_command=True, rich_markup_mode=None)

NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="As `perfit profiles` shows it.")]


@app.callback()
def profiles(context: typer.Context, *, json: JsonFlag = False) -> None:
    """List the profiles on this device; a star marks the one that commands use.

    --profile or PERFIT_PROFILE chooses another, and `use` says which one is meant without them.

    \b
    perfit profiles
    perfit profiles use work
    perfit profiles remove old --yes
    """
    if context.invoked_subcommand is not None:
        return
    session = Session.of(context, json=json)
    settings = session.settings
    names = settings.profiles()
    if session.json:
        session.emit([{"name": name, "current": name == settings.profile} for name in names])
        return
    for name in names:
        print(f"{'*' if name == settings.profile else ' '} {name}")
    if not names:
        say("there is no profile yet; `perfit enroll INVITE` makes one")


@app.command("use")
def use(context: typer.Context, name: NameArgument) -> None:
    """Make a profile the one that commands use; the config file keeps it.

    \b
    perfit profiles use work
    """
    settings = Session.of(context).settings
    _check(settings.profiles(), name)
    Config.read(settings.config_path).with_value("profile", name).write(settings.config_path)
    if settings.profile not in (name, settings.config.profile):
        say(f"PERFIT_PROFILE or --profile says {settings.profile}, which stands over this")


@app.command("remove")
def remove(
    context: typer.Context,
    name: NameArgument,
    *,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Remove a profile for good: its files are overwritten. It needs no passphrase.

    The cloud is not told; `perfit --profile NAME unenroll` tells it, and wipes as well.

    \b
    perfit profiles remove old --yes
    """
    settings = Session.of(context).settings
    if name in finish_removals(settings) and name not in settings.profiles():
        return
    _check(settings.profiles(), name)
    if not yes:
        require_yes(f'this deletes the profile "{name}" for good, with its examples and shifts.')
    wipe_profile(replace(settings, profile=name))
    say(f'removed "{name}"; no copy of its key is left here, but its cloud has not been told')


def finish_removals(settings: DeviceSettings) -> list[str]:
    """Of profiles whose removal was killed; their names."""
    from perfit_device.vault import removal

    done = removal.finish(settings.profiles_folder)
    for name in done:
        _forget_settings(replace(settings, profile=name))
        say(f'what an interrupted removal left of "{name}" is gone now')
    return done


def wipe_profile(settings: DeviceSettings) -> None:
    """Its folder, and what the config file says of it."""
    from perfit_device.agent import launch
    from perfit_device.vault import removal

    launch.stop(settings)
    removal.wipe(settings.vault_path)
    _forget_settings(settings)


def _forget_settings(settings: DeviceSettings) -> None:
    config = Config.read(settings.config_path)
    if (without := config.without_profile(settings.profile)) != config:
        without.write(settings.config_path)


def _check(names: list[str], name: str) -> None:
    if name not in names:
        raise NotFound(f'there is no profile "{name[:64]}"; there are {", ".join(names) or "none"}')
