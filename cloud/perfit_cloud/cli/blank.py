"""`perfit-cloud collective blank`: an artefact for a task that has no collective data yet."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from perfit_cloud.cli.common import MODEL_HELP, layers_of

__all__ = ["blank"]


def blank(  # noqa: PLR0917 - options of a command
    task: Annotated[str, typer.Option(help="Task, for example chat or reply.")],
    model: Annotated[str, typer.Option(help=MODEL_HELP)],
    out: Annotated[Path, typer.Option(help="Folder for the artefact.")],
    data: Annotated[
        Path | None, typer.Option(help="Folder with a task.json; nothing else there is read.")
    ] = None,
    preset: Annotated[str | None, typer.Option(help="Row of settings; the task's own.")] = None,
    layers: Annotated[str | None, typer.Option(help='Blocks to intervene on, counted from 0: "2;3".')] = None,
    positions: Annotated[str | None, typer.Option(help='Prompt tokens to intervene on: "l7".')] = None,
    personal_rank: Annotated[int | None, typer.Option(help="Rank of the seed and personal shifts.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over a history on devices.")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak rate on devices; 1e-3.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Examples a step on devices.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the random start.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    force: Annotated[bool, typer.Option("--force", help="Replace a finished artefact in --out.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Make an artefact without collective data, so that personal shifts work before there are many users.

    Its collective shift changes nothing, and its seed is one small random start. The card says so.

    \b
    perfit-cloud collective blank --task chat --model smollm2 --out artefacts/chat
    perfit-cloud collective blank --task diary --data my_task --preset chat --model smollm2 --out artefacts/diary
    """  # noqa: E501 - \b keeps an example on one line
    from perfit_cloud.collective.blank import BlankRequest, make_blank

    artefact = make_blank(
        BlankRequest(
            task=task,
            model=model,
            out=out,
            data=data,
            preset=preset,
            layers=layers_of(layers),
            positions=positions,
            personal_rank=personal_rank,
            epochs=epochs,
            learning_rate=lr,
            batch_size=batch_size,
            seed=seed,
            device=device,
            force=force,
        )
    )
    result = {"out": str(out), "name": artefact.name, "version": artefact.version}
    if as_json:
        typer.echo(json.dumps(result | {"device_learning_rate": artefact.learning_rate}, ensure_ascii=False))
    else:
        typer.echo(f"{out}: {artefact.name}, version {artefact.version}, blank: no collective data")
