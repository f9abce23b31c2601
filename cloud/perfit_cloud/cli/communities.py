"""`perfit-cloud collective communities`: more seeds for an artefact, one for each cluster of people."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from perfit_cloud.cli.common import (
    AsJson,
    Device,
    DeviceMap,
    Dtype,
    Force,
    MaxMemory,
    Model,
    Out,
    Threads,
    placement_of,
    stopping,
)
from perfit_shared.errors import INTERRUPTED, Cancelled

__all__ = ["communities"]


def communities(  # noqa: PLR0917 - options of a command
    artefact: Annotated[Path, typer.Option(help="Folder of the artefact that gets them.")],
    data: Annotated[
        Path, typer.Option(help="What it was trained on: a JSONL or LaMP/OPPU file, or a folder with one.")
    ],
    model: Model,
    out: Out,
    count: Annotated[
        int, typer.Option("--communities", metavar="K", help="How many, from 2 to 16; fewer may come out.")
    ] = 4,
    users: Annotated[
        int | None, typer.Option(help="Learn from N users only, drawn by --seed.", metavar="N")
    ] = None,
    examples: Annotated[int, typer.Option(min=1, help="Latest examples of each user, at most.")] = 16,
    seed: Annotated[
        int, typer.Option(help="The one that the artefact was trained with: the same users are held out.")
    ] = 0,
    threads: Threads = 0,
    dtype: Dtype = "auto",
    device: Device = "auto",
    device_map: DeviceMap = "none",
    max_memory: MaxMemory = "",
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Learn seeds for communities: users whose examples are alike get one that suits them.

    Users are clustered by what the seed would learn from each, and every cluster of at least seven refines
    the seed for itself, which is kept where it is better for those who did not train it. A device starts at
    the one that suits its user's examples best. φ₁ and the version stay, so personal shifts stay valid. An
    interrupted run goes on when the same command is given again.

    \b
    perfit-cloud collective communities --artefact artefacts/news --data lamp/news_headline --model newslm --out artefacts/news4
    """  # noqa: E501 - \b keeps an example on one line
    from perfit_cloud.collective.community_run import CommunitiesRequest, add_communities

    request = CommunitiesRequest(
        artefact=artefact,
        data=data,
        model=model,
        out=out,
        communities=count,
        users=users,
        seed=seed,
        examples=examples,
        force=force,
        threads=threads,
        dtype=dtype,
        device=device,
        placement=placement_of(device_map, max_memory),
    )
    try:
        with stopping() as stop:
            found = add_communities(request, stop=stop)
    except Cancelled as error:
        typer.echo(f"perfit-cloud: {error}", err=True)
        raise typer.Exit(INTERRUPTED) from None
    told = found.card["communities"]
    if as_json:
        result = {"out": str(out), "name": found.name, "version": found.version, "communities": told}
        typer.echo(json.dumps(result, ensure_ascii=False))
        return
    sizes, held_out = ", ".join(map(str, told["sizes"])), told["held_out"]
    gain = (
        f"; loss of {held_out['people']} held-out users {held_out['seed']:.4f} with the seed -> "
        f"{held_out['chosen']:.4f} with the start that each would choose"
        if held_out
        else ""
    )
    typer.echo(f"{out}: {found.name}, version {found.version}, communities of {sizes} users{gain}")
