"""`perfit-cloud lamp`: the method on LaMP, from its files to the paper's tables."""

from __future__ import annotations

import typer

from perfit_cloud.cli.lamp.compare import compare
from perfit_cloud.cli.lamp.figures import figures
from perfit_cloud.cli.lamp.prepare import prepare
from perfit_cloud.cli.lamp.report import report
from perfit_cloud.cli.lamp.run import run

__all__ = ["app"]

app = typer.Typer(
    no_args_is_help=True,
    help="Reproduce LaMP: prepare its data, run both stages, compare runs, draw the tables.",
)
app.command("prepare")(prepare)
app.command("run")(run)
app.command("compare")(compare)
app.command("figures")(figures)
app.command("report")(report)
