"""`perfit-cloud`: the operator's command."""

from __future__ import annotations

import importlib.util

import typer

from perfit_cloud.cli import (
    analyze,
    artefact,
    audit,
    authority,
    capabilities,
    collective,
    fleet,
    init,
    lamp,
    serve,
    status,
)
from perfit_shared.command_line import run_command
from perfit_shared.errors import ConfigError

__all__ = ["app", "run"]

_EXTRA = ("torch", "transformers", "grpc_health")  # what only perfit[cloud] brings

app = typer.Typer(
    name="perfit-cloud",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("init")(init.init)
app.command("serve")(serve.serve)
app.command("status")(status.status)
app.command("invite")(authority.invite)
app.command("invites")(authority.invites)
app.command("devices")(authority.devices)
app.command("label")(authority.label)
app.command("revoke")(authority.revoke)
app.command("unrevoke")(authority.unrevoke)
app.command("prune")(authority.prune)
app.command("server")(fleet.server)
app.command("rotate")(fleet.rotate)
app.command("migrate-state")(fleet.migrate_state)
app.command("audit")(audit.audit)
app.command("capabilities")(capabilities.capabilities)
app.command("analyze")(analyze.analyze)
app.add_typer(collective.app, name="collective")
app.add_typer(lamp.app, name="lamp")
app.add_typer(artefact.app, name="artefact")


@app.callback()
def options() -> None:
    """Serve a frozen model whose users keep their personality on their own devices.

    \b
    Exit codes: 0 done, 1 a file or value that cannot be, or something that an audit
    found, 2 wrong usage, 130 Ctrl-C, 143 SIGTERM. With --json errors are
    {"error": {"code", "message"}} on stderr.
    """
    if any(importlib.util.find_spec(name) is None for name in _EXTRA):
        raise ConfigError("perfit-cloud needs the cloud extra: pip install 'perfit[cloud]'")


def run() -> None:
    """Exit codes: perfit_shared.errors."""
    run_command("perfit-cloud", app)
