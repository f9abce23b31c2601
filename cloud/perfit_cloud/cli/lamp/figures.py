"""`perfit-cloud lamp figures`: what a run measured, without its texts."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import typer


def figures(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a finished run.")],
    *,
    out: Annotated[Path, typer.Option(help="Folder for figures.json.")],
) -> None:
    """Keep what a run measured without its texts, so that it can be published.

    Of each user it has sums of every metric and the losses: no answer, no text, no id. Where answers are
    labels, the sums of somebody with few queries tell them all the same. `lamp report` and `lamp compare`
    read such a folder like the run's own.

    \b
    perfit-cloud lamp figures runs/headline --out figures/headline
    perfit-cloud lamp report figures/* --out report
    """
    from perfit_cloud.harness import RESULTS_FILE
    from perfit_cloud.lamp.drift_results import drift_of
    from perfit_cloud.lamp.results import Run

    whole = Run.load(run)
    typer.echo(whole.save_figures(out, drift=drift_of(whole)))
    if (run / RESULTS_FILE).is_file() and not out.samefile(run):
        shutil.copyfile(run / RESULTS_FILE, out / RESULTS_FILE)
