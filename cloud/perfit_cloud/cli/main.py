"""`perfit-cloud`: the operator's command."""

from __future__ import annotations

import importlib.util
import sys

import typer

from perfit_cloud.cli import artefact, audit, authority, collective, lamp, serve
from perfit_shared.errors import PerfitError

__all__ = ["app", "run"]

_EXTRA = ("torch", "transformers", "grpc_health")  # what only perfit[cloud] brings

app = typer.Typer(
    name="perfit-cloud",
    help="Serve a frozen model whose users keep their personality on their own devices.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("serve")(serve.serve)
app.command("invite")(authority.invite)
app.command("revoke")(authority.revoke)
app.command("devices")(authority.devices)
app.command("prune")(authority.prune)
app.command("prune")(authority.prune)
app.command("audit")(audit.audit)
app.add_typer(collective.app, name="collective")
app.add_typer(lamp.app, name="lamp")
app.add_typer(artefact.app, name="artefact")


def run() -> None:
    """Entry point. What goes wrong on purpose is one line on stderr and exit code 1."""
    if any(importlib.util.find_spec(name) is None for name in _EXTRA):
        print("perfit-cloud needs the cloud extra: pip install 'perfit[cloud]'", file=sys.stderr)
        sys.exit(1)
    try:
        app()
    except PerfitError as error:
        print(f"perfit-cloud: {error}", file=sys.stderr)
        sys.exit(1)
    except OSError as error:  # a folder that cannot be written, a disk that is full
        place = f"{error.filename}: " if error.filename else ""
        print(f"perfit-cloud: {place}{error.strerror or type(error).__name__}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
