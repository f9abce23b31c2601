"""`perfit-cloud analyze`: what a history changes in a model, and what that says about layers and ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from perfit_cloud.cli.common import (
    AsJson,
    Chat,
    Device,
    DeviceMap,
    Dtype,
    MaxMemory,
    Model,
    Prompts,
    Threads,
    placement_of,
    stopping,
)
from perfit_shared.errors import INTERRUPTED, Cancelled, InvalidInput


def analyze(  # noqa: PLR0917 - typer's way; all are options
    model: Model,
    data: Annotated[
        list[Path],
        typer.Option(help="Folder with a task's files, or one of them; several for a map of tasks."),
    ],
    out: Annotated[Path, typer.Option(help="Folder for vectors, pictures and the report.")],
    task: Annotated[
        str | None, typer.Option(help="For example news_headline.  [default: task.json's]")
    ] = None,
    prompts: Prompts = None,
    chat: Chat = None,
    k: Annotated[int, typer.Option(help="Entries of the own history before a query.")] = 4,
    queries: Annotated[int, typer.Option(help="Most queries of a user; of histories the latest items.")] = 32,
    users: Annotated[int | None, typer.Option(help="The first N users of a file.")] = None,
    control: Annotated[
        bool, typer.Option(help="Measure random prefixes of the histories' lengths too.")
    ] = True,
    layer: Annotated[
        int | None, typer.Option(help="Block whose users are drawn.  [default: the middle one]")
    ] = None,
    artefact: Annotated[
        list[Path] | None, typer.Option(help="Trained shifts, for Proposition 3's cross term; one a task.")
    ] = None,
    run: Annotated[
        Path | None,
        typer.Option(help="A finished `lamp run`, whose personal shifts the cross term is measured on."),
    ] = None,
    texts: Annotated[bool, typer.Option(help="Show users' ids and texts in the report.")] = True,
    seed: Annotated[int, typer.Option(help="Of random prefixes.")] = 0,
    threads: Threads = 0,
    dtype: Dtype = "auto",
    device: Device = "auto",
    device_map: DeviceMap = "none",
    max_memory: MaxMemory = "",
    as_json: AsJson = False,
) -> None:
    """Measure how users' histories move every block of a model, and recommend layers, ranks and positions.

    OUT/report.html holds tables beside the paper's, pictures, and a recommendation with its reason;
    analysis.json holds the numbers. What is finished is kept: the same command goes on after an
    interruption.

    \b
    perfit-cloud analyze --model MODEL --data lamp/news_headline --out analysis
    perfit-cloud analyze --model MODEL --data lamp/news_headline --data lamp/movie_tagging --out both
    perfit-cloud analyze --model MODEL --data lamp/news_headline --run runs/headline --out trained --no-texts
    """
    from perfit_cloud.analysis.queries import QueryOptions
    from perfit_cloud.analysis.request import AnalysisRequest
    from perfit_cloud.analysis.run import run_analysis

    artefacts, personal = artefact or [], None
    if run is not None:
        artefacts = artefacts or [run / "artefact"]
        personal = _personal(run, artefacts[0])
    request = AnalysisRequest(
        model=model,
        data=tuple(data),
        out=out,
        task=task,
        prompts=prompts,
        chat=chat,
        queries=QueryOptions(retrieved=k, most=queries),
        users=users,
        control=control,
        layer=layer,
        artefacts=tuple(artefacts),
        texts=texts,
        seed=seed,
        threads=threads,
        dtype=dtype,
        device=device,
        placement=placement_of(device_map, max_memory),
    )
    try:
        with stopping() as stop:
            found = run_analysis(request, personal=personal, stop=stop)
    except Cancelled as error:
        typer.echo(f"perfit-cloud: {error}", err=True)
        raise typer.Exit(INTERRUPTED) from None
    if as_json:
        typer.echo(json.dumps(found))
        return
    for name, numbers in found["tasks"].items():
        best = numbers["recommendation"]
        layers = ";".join(map(str, best["layers"]))
        typer.echo(
            f'{name}: --layers "{layers}" --collective-rank {best["collective_rank"]} '
            f"--personal-rank {best['personal_rank']} --positions {best['positions']}"
        )
        typer.echo(best["reason"])
    typer.echo(out / "report.html")


def _personal(folder: Path, artefact: Path) -> dict[str, Path]:
    """Files of the personal shifts of a finished run on this artefact, by user id."""
    from perfit_cloud.lamp.methods.perfit import PerFit
    from perfit_cloud.lamp.results import Run, UserFolder
    from perfit_cloud.model.artefacts import Artefact

    run = Run.load(folder)
    if run.settings["method"] != PerFit.name:
        raise InvalidInput(f"{folder} is a run of {run.settings['method']}; personal shifts are perfit's")
    if run.settings["artefact"] != Artefact.load(artefact).version:
        raise InvalidInput(
            f"the shifts of {folder} were not trained on {artefact}; name theirs by --artefact"
        )
    folders = {u.user_id: UserFolder(folder, u.user_id, PerFit.state_file) for u in run.users}
    found = {name: one.state_path for name, one in folders.items() if one.has_state}
    if not found:
        raise InvalidInput(f"{folder} has trained nobody's shift")
    return found
