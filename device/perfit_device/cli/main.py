"""`perfit`: the device's command line."""

from __future__ import annotations

import typer

from perfit_device.cli import ask, enroll, evaluate, history, profile, update
from perfit_device.cli.common import JsonFlag, ProfileOption, Session
from perfit_device.settings import prepare_process
from perfit_shared.command_line import run_command

__all__ = ["app", "run"]

app = typer.Typer(
    name="perfit",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def options(context: typer.Context, profile: ProfileOption = None, json: JsonFlag = False) -> None:
    """A personal language model whose personality stays on this device.

    \b
    perfit enroll -                                  paste the operator's invite
    perfit history import mine.jsonl --task news_headline
    perfit update                                    train your shift
    perfit ask "The council met until dawn."         a personal answer
    perfit ask "The council met until dawn." --compare

    \b
    Settings: PERFIT_HOME (default ~/.perfit), PERFIT_PROFILE and PERFIT_PASSPHRASE.
    PERFIT_COSTLY_VAULT=1 opens a vault whose key costs more than perfit's own do.

    \b
    Exit codes: 0 done, 1 a file or value that cannot be, 2 wrong usage,
    3 no cloud to be reached, or a busy one, 4 the cloud refuses this device,
    5 the gate kept an update out, 6 the vault, 7 an update stopped half-way,
    130 Ctrl-C. With --json errors are {"error": {"code", "message"}} on stderr.
    """
    context.obj = Session(profile=profile, json=json)


app.command("enroll")(enroll.enroll)
app.command("ask")(ask.ask)
app.add_typer(history.app, name="history")
app.command("update")(update.update)
app.command("evaluate")(evaluate.evaluate)
app.command("undo")(profile.undo)
app.command("export")(profile.export)
app.command("status")(profile.status)
app.command("profiles")(profile.profiles)
app.command("passphrase")(profile.passphrase)


def run() -> None:
    """Exit codes: perfit_shared.errors."""
    prepare_process()
    run_command("perfit", app)
