"""`perfit-cloud lamp report`: the paper's tables and figures from finished runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of finished runs.")],
    *,
    out: Annotated[Path, typer.Option(help="Folder for report.md and its PNGs.")],
    no_texts: Annotated[
        bool, typer.Option("--no-texts", help="Figures alone: no answer, no text of a person, no user's id.")
    ] = False,
) -> None:
    """Draw what the runs allow: main table, ablation, sweeps, seeds, costs, with the paper's figures.

    Runs that differ in their seed alone become one row with its spread. Prints where the report lies.

    \b
    perfit-cloud lamp report runs/* --out report
    perfit-cloud lamp report runs/* --out report --no-texts
    """
    from perfit_cloud.lamp.report import write_report

    typer.echo(write_report(runs, out, texts=not no_texts))
