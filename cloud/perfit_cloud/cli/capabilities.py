"""`perfit-cloud capabilities`: what a shift does to a model's general capabilities."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from perfit_cloud.cli.common import AsJson, Device, Dtype, Model, Threads
from perfit_cloud.text_tables import aligned_table

_HEAD = ("task", "metric", "queries", "off", "on", "on - off", "standard error, off")


def capabilities(  # noqa: PLR0917 - typer's way; all are options
    model: Model,
    artefact: Annotated[Path, typer.Option(help="Artefact folder.")],
    shift: Annotated[
        Path | None,
        typer.Option(help="A personal shift, of `perfit export --shift` or a run's users/; else the seed."),
    ] = None,
    tasks: Annotated[
        str,
        typer.Option(
            help="Names of lm-eval's tasks, table17 or table18 (the paper's; their data come from the hub), "
            "perfit_everyday or perfit_naming (which are here)."
        ),
    ] = "perfit_everyday,perfit_naming",
    limit: Annotated[int | None, typer.Option(min=1, help="Queries a task, at most.")] = None,
    shots: Annotated[
        int | None, typer.Option(min=0, help="Examples in a prompt.  [default: the task's]")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for capabilities.json, which `lamp report` reads from a run's folder."),
    ] = None,
    threads: Threads = 0,
    dtype: Dtype = "auto",
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Run tasks of lm-eval-harness with the shift off and on: does it cost general capabilities?

    Off is the untouched model; on, the collective shift and a personal one act on every prompt. lm-eval
    comes with perfit[capabilities].

    \b
    perfit-cloud capabilities --model smollm2 --artefact cloud/perfit_cloud/artefacts/news_headline
    perfit-cloud capabilities --model MODEL --artefact artefacts/tags --shift mine.safetensors --tasks table17 --out runs/tags
    """  # noqa: E501 - \b keeps an example on one line
    from perfit_cloud.harness.evaluate import check_installed, measure_capabilities, names_of, write_measured
    from perfit_cloud.model.artefacts import Artefact
    from perfit_cloud.model.base import load_base
    from perfit_cloud.model.pyreft import read_personal

    names = names_of(tasks)
    check_installed()
    loaded = Artefact.load(artefact)
    personal = None if shift is None else read_personal(shift, loaded)
    if threads > 0:
        import torch

        torch.set_num_threads(threads)
    base = load_base(model, dtype=dtype, device=device)
    found = measure_capabilities(base, loaded, personal, names, limit=limit, shots=shots)
    if out is not None:
        write_measured(out, base.name, loaded, found)
    if as_json:
        typer.echo(json.dumps([one.to_json() for one in found]))
        return
    rows = [
        [
            *(one.task, one.metric, str(one.queries), f"{one.off:.4f}", f"{one.on:.4f}"),
            f"{one.on - one.off:+.4f}",
            "-" if one.off_error is None else f"{one.off_error:.4f}",
        ]
        for one in found
    ]
    typer.echo("\n".join(aligned_table(_HEAD, rows)))
