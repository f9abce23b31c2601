"""`perfit agent`, `lock` and `unlock`: the process that keeps a profile open."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from perfit_device.cli import prompts
from perfit_device.cli.common import JsonFlag, ProfileOption, Session, say
from perfit_shared.errors import NotFound, Unavailable

if TYPE_CHECKING:
    from perfit_device.agent.client import AgentClient
    from perfit_device.agent.controls import AgentState

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="The process that keeps a profile open, so that its passphrase is typed once.",
)
KeyringFlag = Annotated[
    bool, typer.Option("--keyring", help="Let the OS keyring unlock it whenever it starts.")
]


@app.command("start")
def start(
    context: typer.Context,
    *,
    locked: Annotated[bool, typer.Option("--locked", help="Start it locked, without a passphrase.")] = False,
    profile: ProfileOption = None,
    json: JsonFlag = False,
) -> None:
    """Start the agent in the background. A passphrase that you type at a command starts it, too.

    `perfit config set agent.start never` starts none by itself, and agent.lock_minutes says after how many
    minutes without use it locks itself (15; 0: never).

    \b
    perfit agent start
    PERFIT_AGENT_LOCK_MINUTES=60 perfit agent start
    """
    session = Session.of(context, profile=profile, json=json)
    from perfit_device.agent.client import connect

    settings = session.settings
    settings.check_exists()
    agent = connect(settings)
    if agent is not None:
        say("the agent runs already")
    else:
        agent = _started(session, locked=locked)
    with agent:
        _show(session, _state(agent))


def _started(session: Session, *, locked: bool) -> AgentClient:
    by_keyring = session.vault_lock() == "keyring"
    can_type = session.settings.has_passphrase or prompts.has_terminal()
    if locked or not (by_keyring or can_type):
        agent = session.start_agent(None, unlock="later")
    elif by_keyring:
        agent = session.start_agent(None, unlock="keyring")
    else:
        agent = session.start_agent(session.passphrase())
    if agent is None:
        raise Unavailable("the agent ended at once; its log is agent.log, beside the vault")
    return agent


@app.command("stop")
def stop(context: typer.Context, profile: ProfileOption = None) -> None:
    """End the agent. An update that it runs stops with a checkpoint, and the next one resumes there.

    \b
    perfit agent stop
    """
    session = Session.of(context, profile=profile)
    from perfit_device.agent import launch

    if not launch.stop(session.settings):
        raise NotFound("no agent of this profile runs")
    say("the agent has ended")


@app.command("status")
def status(context: typer.Context, *, profile: ProfileOption = None, json: JsonFlag = False) -> None:
    """Show whether an agent runs, and whether it is locked.

    \b
    perfit agent status --json
    """
    session = Session.of(context, profile=profile, json=json)
    from perfit_device.agent.client import connect

    agent = connect(session.settings)
    if agent is None and session.json:
        session.emit({"agent": False})
    elif agent is None:
        print("no agent of this profile runs; `perfit agent start` starts one")
    else:
        with agent:
            _show(session, _state(agent))


@app.command("install")
def install(
    context: typer.Context,
    *,
    keyring: KeyringFlag = False,
    show: Annotated[bool, typer.Option("--print", help="Print the file, and change nothing.")] = False,
    profile: ProfileOption = None,
) -> None:
    """Let the system start the agent when you log in: systemd, launchd or Windows' Task Scheduler.

    It starts locked; `perfit unlock` opens it.

    \b
    perfit agent install --print
    perfit agent install
    """
    session = Session.of(context, profile=profile)
    from perfit_device.agent import install as installing

    session.settings.check_exists()
    file = installing.start_file(session.settings, unlock="keyring" if keyring else "later")
    if show:
        sys.stdout.write(file.data.decode("utf-16" if file.data[:2] == b"\xff\xfe" else "utf-8"))
        return
    failed = installing.install(file)
    say(f"wrote {file.path}; the agent starts when you log in")
    for command in failed:
        say(f"this failed, try it yourself: {command}")


@app.command("uninstall")
def uninstall(context: typer.Context, profile: ProfileOption = None) -> None:
    """Take back what `perfit agent install` did. An agent that runs goes on.

    \b
    perfit agent uninstall
    """
    session = Session.of(context, profile=profile)
    from perfit_device.agent import install as installing

    file = installing.start_file(session.settings, unlock="later")
    installing.uninstall(file)
    say(f"removed {file.path}")


def lock(
    context: typer.Context,
    *,
    now: Annotated[
        bool, typer.Option("--now", help="Stop what runs, too; an update keeps its checkpoint.")
    ] = False,
    profile: ProfileOption = None,
    json: JsonFlag = False,
) -> None:
    """Lock the profile: its agent closes the vault and forgets key and channel.

    What runs goes on to its end first, and nothing new begins.

    \b
    perfit lock
    perfit lock --now
    """
    session = Session.of(context, profile=profile, json=json)
    from perfit_device.agent.controls import Lock

    with _agent(session) as agent:
        _show(session, agent.perform(Lock(now=now)))


def unlock(context: typer.Context, *, profile: ProfileOption = None, json: JsonFlag = False) -> None:
    """Unlock the profile's agent, by the passphrase or the OS keyring; where none runs, start one.

    \b
    perfit unlock
    """
    session = Session.of(context, profile=profile, json=json)
    from perfit_device.agent.client import connect
    from perfit_device.agent.controls import Unlock

    settings = session.settings
    settings.check_exists()
    agent = connect(settings) or _started(session, locked=False)
    with agent:
        if agent.hello.is_locked:
            given = session.passphrase().encode() if agent.hello.lock == "passphrase" else None
            agent.perform(Unlock(given))
        _show(session, _state(agent))


def _agent(session: Session) -> AgentClient:
    from perfit_device.agent.client import connect

    agent = connect(session.settings)
    if agent is None:
        raise NotFound("no agent of this profile runs, so nothing is unlocked")
    return agent


def _state(agent: AgentClient) -> AgentState:
    from perfit_device.agent.controls import State

    return agent.perform(State())


def _show(session: Session, state: AgentState) -> None:
    if session.json:
        session.emit({"agent": True, **asdict(state)})
        return
    print(f"agent, process {state.pid}: {'locked' if state.is_locked else 'unlocked'}")
    if state.running:
        what = "the vault closes when they end" if state.is_locked else "at work"
        print(f"{state.running} operations run; {what}")
    elif not state.is_locked and state.idle_seconds:
        print(f"locks itself after {state.idle_seconds / 60:g} minutes without use")
