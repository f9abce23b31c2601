"""`perfit-cloud collective`: train a task's collective shift (stage 1), or make a blank one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from perfit_cloud.cli.blank import blank
from perfit_cloud.cli.common import (
    AsJson,
    BatchSize,
    Chat,
    CollectiveRank,
    Device,
    DeviceMap,
    Dtype,
    Force,
    Layers,
    MaxMemory,
    Model,
    Out,
    PersonalRank,
    Positions,
    Preset,
    Prompts,
    Threads,
    layers_of,
    placement_of,
    stopping,
)
from perfit_cloud.cli.communities import communities as communities_command
from perfit_shared.errors import INTERRUPTED, Cancelled, InvalidInput

if TYPE_CHECKING:
    from perfit_cloud.collective.privacy import Budget
    from perfit_cloud.model.artefacts import Artefact

app = typer.Typer(
    no_args_is_help=True,
    help="Train collective shifts, the part of personalisation that all users of a task share.",
)
app.command("blank")(blank)
app.command("communities")(communities_command)


@app.command()
def train(  # noqa: PLR0917 - typer's way; all are options
    data: Annotated[
        Path,
        typer.Option(
            help="JSONL file (one item a line, user_id optional), LaMP/OPPU file, or a folder with one."
        ),
    ],
    model: Model,
    out: Out,
    task: Annotated[
        str | None, typer.Option(help="Task, for example news_headline or chat; the one of DATA's task.json.")
    ] = None,
    preset: Preset = None,
    prompts: Prompts = None,
    chat: Chat = None,
    layers: Layers = None,
    positions: Positions = None,
    collective_rank: CollectiveRank = None,
    personal_rank: PersonalRank = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over everybody's examples.")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate; chosen on held-out users.")] = None,
    batch_size: BatchSize = None,
    accumulate: Annotated[int, typer.Option(help="Micro-batches a step: less memory, the same step.")] = 1,
    gradient_checkpointing: Annotated[
        bool,
        typer.Option("--gradient-checkpointing", help="Compute activations twice: less memory, same step."),
    ] = False,
    users: Annotated[
        int | None, typer.Option(help="Train on N users only, drawn by --seed.", metavar="N")
    ] = None,
    validation: Annotated[
        Path | None,
        typer.Option(help="Examples of others to validate on; a slice of the data's users.", metavar="FILE"),
    ] = None,
    epsilon: Annotated[
        float | None,
        typer.Option(help="Train with differential privacy by person: a bound on what is told of anyone."),
    ] = None,
    delta: Annotated[
        float | None, typer.Option(help="Of --epsilon, below 1 / people; a tenth of that.")
    ] = None,
    clip_norm: Annotated[
        float | None, typer.Option(help="Of --epsilon: largest norm of one person's gradient; 1.")
    ] = None,
    people_per_step: Annotated[
        int | None, typer.Option(help="Of --epsilon: how many people a step expects; a tenth of all.")
    ] = None,
    communities: Annotated[
        int,
        typer.Option(
            metavar="K", help="Seeds for K clusters of users, from 2 to 16, beside the plain one; 1: none."
        ),
    ] = 1,
    seed: Annotated[int, typer.Option(help="Of the shifts' start, the batches and the split.")] = 0,
    device_epochs: Annotated[int | None, typer.Option(help="Passes over a history on devices.")] = None,
    device_lr: Annotated[float | None, typer.Option(help="Peak rate on devices; chosen by trials.")] = None,
    threads: Threads = 0,
    dtype: Dtype = "auto",
    device: Device = "auto",
    device_map: DeviceMap = "none",
    max_memory: MaxMemory = "",
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Learn the collective shift and the seed of a task from many users' examples.

    An interrupted run goes on when the same command is given again. Progress is on stderr.
    On several GPUs or hosts, put accelerate's launcher in front: one process a GPU.

    Every enrolled device can recover the collective shift from gradient calls: it may tell members
    something of the people it was learned from. --epsilon bounds that, at a cost in what is learned
    that only many people pay for; it needs --lr, and public examples in --validation.

    \b
    perfit-cloud collective train --task news_headline --data lamp/news_headline --model newslm --out artefacts/news_headline
    perfit-cloud collective train --task chat --data chats.jsonl --model newslm --lr 2e-3 --epochs 1 --out artefacts/chat
    perfit-cloud collective train --data tickets --model newslm --out artefacts/tickets       the task is in tickets/task.json
    accelerate launch --num_processes 4 $(which perfit-cloud) collective train --task chat --data chats.jsonl --model llama --out artefacts/chat
    """  # noqa: E501 - \b keeps an example on one line
    from perfit_cloud.collective.processes import Processes, close_processes
    from perfit_cloud.collective.run import CollectiveRequest, train_collective

    request = CollectiveRequest(
        task=task,
        data=data,
        model=model,
        out=out,
        preset=preset,
        prompts=prompts,
        chat=chat,
        layers=layers_of(layers),
        positions=positions,
        collective_rank=collective_rank,
        personal_rank=personal_rank,
        epochs=epochs,
        validation=validation,
        budget=_budget(epsilon, delta, clip_norm, people_per_step),
        communities=communities,
        learning_rate=lr,
        batch_size=batch_size,
        accumulate=accumulate,
        gradient_checkpointing=gradient_checkpointing,
        users=users,
        device_epochs=device_epochs,
        device_learning_rate=device_lr,
        seed=seed,
        force=force,
        dtype=dtype,
        device=device,
        placement=placement_of(device_map, max_memory),
        threads=threads,
    )
    main = Processes().main
    try:
        with stopping() as stop:
            artefact = train_collective(request, stop=stop)
    except Cancelled as error:
        close_processes()
        if main:
            typer.echo(f"perfit-cloud: {error}", err=True)
        raise typer.Exit(INTERRUPTED) from None
    close_processes()
    if main:
        result = json.dumps(_result(artefact, out), ensure_ascii=False) if as_json else _line(artefact, out)
        typer.echo(result)


def _budget(
    epsilon: float | None, delta: float | None, clip_norm: float | None, people_per_step: int | None
) -> Budget | None:
    from perfit_cloud.collective.privacy import Budget

    given = {"delta": delta, "clip_norm": clip_norm, "people_per_step": people_per_step}
    chosen = {name: value for name, value in given.items() if value is not None}
    if epsilon is None:
        if chosen:
            raise InvalidInput("--delta, --clip-norm and --people-per-step belong to --epsilon")
        return None
    return Budget(epsilon, **chosen)  # type: ignore[arg-type]


def _result(artefact: Artefact, out: Path) -> dict[str, Any]:
    card = artefact.card
    return {
        "out": str(out),
        "name": artefact.name,
        "version": artefact.version,
        "validation_loss": card["losses"]["validation"],
        "learning_rate": card["hyper_parameters"]["learning_rate"],
        "device_learning_rate": artefact.learning_rate,
        "seconds": card["seconds"],
        "speed": card["speed"],
    }


def _line(artefact: Artefact, out: Path) -> str:
    loss = artefact.card["losses"]["validation"]
    return (
        f"{out}: {artefact.name}, version {artefact.version}, validation loss base {loss['base']:.4f} -> "
        f"collective {loss['collective']:.4f}, with the seed {loss['seed']:.4f}"
    )
