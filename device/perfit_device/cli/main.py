"""`perfit`: the device's command line."""

from __future__ import annotations

import sys

import typer

from perfit_device.cli import ask, enroll, evaluate, history, profile, update
from perfit_device.cli.common import JsonFlag, ProfileOption, Session, one_line
from perfit_device.settings import prepare_process
from perfit_shared.errors import PerfitError

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

    Settings: PERFIT_HOME (default ~/.perfit) and PERFIT_PASSPHRASE.
    """
    context.obj = Session(profile=profile, json=json)


app.command("enroll")(enroll.enroll)
app.command("ask")(ask.ask)
app.add_typer(history.app, name="history")
app.command("update")(update.update)
app.command("evaluate")(evaluate.evaluate)
app.command("export")(profile.export)
app.command("status")(profile.status)
app.command("passphrase")(profile.passphrase)


def run() -> None:
    """Exit codes: 0, 1 with one line on stderr, 2 for wrong usage, 130 after Ctrl-C."""
    prepare_process()
    try:
        app()
    except PerfitError as error:
        print(f"perfit: {one_line(str(error))}", file=sys.stderr)
        sys.exit(1)
