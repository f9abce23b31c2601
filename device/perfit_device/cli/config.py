"""`perfit config`: what is set once for all commands. No vault is opened."""

from __future__ import annotations

from typing import Annotated

import typer

from perfit_device.cli.common import JsonFlag, ProfileOption, Session, say
from perfit_device.config import KEYS, Config
from perfit_shared.errors import NotFound

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)

KeyArgument = Annotated[str, typer.Argument(metavar="KEY", help="As `perfit config -h` lists them.")]


@app.callback()
def options() -> None:
    """What is set once for all commands, in config.toml of perfit's home.

    \b
    profile              the profile that commands use
    task                 the task that they mean, in the profile at hand;
                         task.NAME is that of another profile
    sealed               whether its calls are sealed to the cloud's process, so that
                         no front which ends TLS reads them, or are not sent (false)
    front_ca             PEM file: who vouches for that front, beside the cloud's own CA
    examples             how many own examples stand before a question, and before what
                         an update learns; unset: 4 where answers are one line
    agent.lock_minutes   idle minutes after which the agent locks itself (15)
    agent.start          auto: commands start an agent when they need one; or never
    update.auto          whether an agent trains by itself what is due (true)
    update.unlock_by_keyring
                         whether a locked one may unlock itself for that (false)

    \b
    A flag stands over a variable, a variable over the file: PERFIT_PROFILE, PERFIT_TASK,
    PERFIT_AGENT_LOCK_MINUTES, PERFIT_AGENT_START.

    \b
    perfit config set task reply
    perfit config set agent.lock_minutes 30
    perfit config list
    """


@app.command("get")
def get(
    context: typer.Context, key: KeyArgument, *, profile: ProfileOption = None, json: JsonFlag = False
) -> None:
    """Print what is set.

    \b
    perfit config get task
    """
    session = Session.of(context, profile=profile, json=json)
    key, config = _key(session, key), Config.read(session.settings.config_path)
    value = config.values.get(key)
    if value is None:
        config.with_value(key, None)  # raises where there is no such key
        raise NotFound(f"{key} is not set")
    if session.json:
        session.emit({"key": key, "value": value})
    else:
        print(_text(value))


@app.command("set")
def set_(
    context: typer.Context,
    key: KeyArgument,
    value: Annotated[str, typer.Argument(metavar="VALUE")],
    *,
    profile: ProfileOption = None,
) -> None:
    """Set it. Comments in the file are not kept.

    \b
    perfit config set profile work
    perfit config set task reply
    """
    session = Session.of(context, profile=profile)
    path = session.settings.config_path
    Config.read(path).with_value(_key(session, key), value).write(path)


@app.command("unset")
def unset(context: typer.Context, key: KeyArgument, *, profile: ProfileOption = None) -> None:
    """Take it out of the file.

    \b
    perfit config unset task
    """
    session = Session.of(context, profile=profile)
    path, key = session.settings.config_path, _key(session, key)
    config = Config.read(path)
    new = config.with_value(key, None)
    if new == config:
        raise NotFound(f"{key} is not set")
    new.write(path)


@app.command("list")
def list_(context: typer.Context, *, json: JsonFlag = False) -> None:
    """Print everything that is set.

    \b
    perfit config list
    """
    session = Session.of(context, json=json)
    config = Config.read(session.settings.config_path)
    if session.json:
        session.emit(dict(config.values))
        return
    for key, value in sorted(config.values.items()):
        print(f"{key} = {_text(value)}")
    if not config.values:
        say(f"nothing is set; the keys are {', '.join(KEYS)}")


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _key(session: Session, key: str) -> str:
    """`task` and the like are those of the profile at hand."""
    return f"{key}.{session.settings.profile}" if f"{key}.PROFILE" in KEYS else key
