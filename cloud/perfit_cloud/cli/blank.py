"""`perfit-cloud collective blank`: an artefact for a task that has no collective data yet."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from perfit_cloud.cli.common import (
    AsJson,
    Device,
    DeviceMap,
    Force,
    Layers,
    MaxMemory,
    Model,
    Out,
    PersonalRank,
    Positions,
    Preset,
    layers_of,
    placement_of,
)

__all__ = ["blank"]


def blank(  # noqa: PLR0917 - options of a command
    task: Annotated[str, typer.Option(help="Task, for example chat or reply.")],
    model: Model,
    out: Out,
    data: Annotated[
        Path | None, typer.Option(help="Folder with a task.json; nothing else there is read.")
    ] = None,
    preset: Preset = None,
    layers: Layers = None,
    positions: Positions = None,
    personal_rank: PersonalRank = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over a history on devices.")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak rate on devices; 1e-3.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Examples a step on devices.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the random start.")] = 0,
    device: Device = "auto",
    device_map: DeviceMap = "none",
    max_memory: MaxMemory = "",
    force: Force = False,
    as_json: AsJson = False,
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
            placement=placement_of(device_map, max_memory),
            force=force,
        )
    )
    result = {"out": str(out), "name": artefact.name, "version": artefact.version}
    if as_json:
        typer.echo(json.dumps(result | {"device_learning_rate": artefact.learning_rate}, ensure_ascii=False))
    else:
        typer.echo(f"{out}: {artefact.name}, version {artefact.version}, blank: no collective data")
