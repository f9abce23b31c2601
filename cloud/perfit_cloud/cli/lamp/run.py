"""`perfit-cloud lamp run`: both stages, answers and metrics for one task."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from perfit_cloud.cli.common import (
    BatchSize,
    Chat,
    CollectiveRank,
    Device,
    DeviceMap,
    Dtype,
    Layers,
    MaxMemory,
    Model,
    PersonalRank,
    Positions,
    Preset,
    Prompts,
    Threads,
    layers_of,
    placement_of,
    stopping,
)
from perfit_cloud.text_tables import aligned_table
from perfit_shared.errors import INTERRUPTED, Cancelled, InvalidInput

_GIB, _MOST_GIB = 1 << 30, 1 << 20


def run(  # noqa: PLR0917 - typer's way; all are options
    model: Model,
    data: Annotated[Path, typer.Option(help="Folder with the task's files, as `lamp prepare` makes it.")],
    out: Annotated[Path, typer.Option(help="Folder for everything the run makes.")],
    task: Annotated[
        str | None,
        typer.Option(help="For example news_headline.  [default: the artefact's, else task.json's]"),
    ] = None,
    artefact: Annotated[
        Path | None, typer.Option(help="Collective shift to use instead of training one; of any task.")
    ] = None,
    lora: Annotated[
        Path | None, typer.Option(help="OUT of a run whose collective LoRA to use instead of training one.")
    ] = None,
    lora_layers: Annotated[
        str, typer.Option(help="Of lora-c+perfit: the LoRA on all blocks, or on perfit's.")
    ] = "all",
    preset: Preset = None,
    prompts: Prompts = None,
    chat: Chat = None,
    schedule: Annotated[
        str,
        typer.Option(
            help="Of stage 2: paper (Table 9 as it stands), or device (what a device would do: more steps on "
            "a short history, the latest part held out to choose the epoch)."
        ),
    ] = "paper",
    users: Annotated[int | None, typer.Option(help="The first N users of the test cohort.")] = None,
    examples: Annotated[int | None, typer.Option(help="The latest N of each history; 0: none.")] = None,
    queries: Annotated[int | None, typer.Option(help="The first N queries of each user.")] = None,
    reuse: Annotated[
        Path | None,
        typer.Option(
            help="A finished run of the same people: answers of the untouched model and of the same "
            "collective shift or LoRA are taken from it, and for perfit+rag the shifts of perfit."
        ),
    ] = None,
    modes: Annotated[
        str | None,
        typer.Option(
            help="What is measured: some of base, collective, seed, personal, other (by somebody else's "
            "state), as personal,seed.  [default: all that the method has]"
        ),
    ] = None,
    collective_users: Annotated[
        int | None, typer.Option(help="Stage 1 on N users, chosen by the seed.")
    ] = None,
    collective_group: Annotated[
        int | None,
        typer.Option(help="Stage 1 on group 0 to 4: five of equal size, drawn by the seed (Table 15)."),
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            help="How answers become personal: perfit, a part of it (perfit_stage1, perfit_stage2, "
            "perfit_stage2_sum or reft), perfit+rag, perfit_behind+rag, perfit_stage1+rag, none, rag, pag, "
            "stylevector, lora-c, lora-p, oppu, lora-c+perfit, lofit."
        ),
    ] = "perfit",
    k: Annotated[int, typer.Option(help="rag, …+rag: own examples before a query.")] = 4,
    profile_model: Annotated[
        str | None, typer.Option(help="pag: model that writes profiles.  [default: the base]")
    ] = None,
    strength: Annotated[
        float | None,
        typer.Option(help="stylevector: of the vector.  [default: chosen on a part of the history]"),
    ] = None,
    histories: Annotated[
        str, typer.Option(help="own, or other, an ablation: everybody trains on the next user's history.")
    ] = "own",
    sweep: Annotated[
        str | None,
        typer.Option(
            help="Several runs: layers[=0,1], layer-counts[=1,2,4], ranks[=4,16], seeds[=0,1], groups[=0,1], "
            "collective-users[=10], examples[=5,10], ablations, artefacts=DIR,DIR."
        ),
    ] = None,
    layers: Layers = None,
    positions: Positions = None,
    collective_rank: CollectiveRank = None,
    personal_rank: PersonalRank = None,
    batch_size: BatchSize = None,
    epochs: Annotated[int | None, typer.Option(help="Stage 2: passes over a history.")] = None,
    lr: Annotated[
        float | None,
        typer.Option(help="Stage 2: peak rate.  [default: by trials; with --schedule device the artefact's]"),
    ] = None,
    collective_epochs: Annotated[int | None, typer.Option(help="Stage 1: passes over everybody.")] = None,
    collective_lr: Annotated[
        float | None, typer.Option(help="Stage 1: peak rate.  [default: chosen on held-out users]")
    ] = None,
    drift: Annotated[
        bool,
        typer.Option("--drift", help="Also measure how far answers drift on prompts that concern nobody."),
    ] = False,
    seed: Annotated[int, typer.Option(help="Of shifts, batches, splits and draws.")] = 0,
    temperature: Annotated[float, typer.Option(help="Of answers; 0: greedy.")] = 0.1,
    frequency_penalty: Annotated[
        float | None, typer.Option(help="Of answers, -2 to 2: against repetition.  [default: the task's]")
    ] = None,
    users_together: Annotated[int, typer.Option(help="Users whose steps run as one pass.")] = 8,
    keep_gib: Annotated[float, typer.Option(help="Memory for activations kept between steps.")] = 4.0,
    threads: Threads = 0,
    dtype: Dtype = "auto",
    device: Device = "auto",
    device_map: DeviceMap = "none",
    max_memory: MaxMemory = "",
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Fit and measure people on a Ray cluster, host:port; local: in several processes here.",
        ),
    ] = None,
    ray_workers: Annotated[
        int | None,
        typer.Option(help="Processes with a model each.  [default: one for each GPU, or for --threads CPUs]"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print summary.json, a list for a sweep.")] = False,
) -> None:
    """Train both stages for a task's users, answer their held-out queries, and measure.

    What is finished is kept: the same command goes on after an interruption. The defaults are the
    paper's settings for the task, with layers mapped to the depth of the model, and learning rates
    chosen on held-out collective users. OUT holds predictions.json in LaMP's schema and summary.json.

    \b
    perfit-cloud lamp run --task news_headline --model MODEL --data lamp/news_headline --out runs/headline
    perfit-cloud lamp run --task movie_tagging --model MODEL --data lamp/movie_tagging --out runs/tags --users 10
    perfit-cloud lamp run --task news_headline --model MODEL --data lamp/news_headline --out runs/sweep --sweep layers
    perfit-cloud lamp run --task news_headline --model MODEL --data lamp/news_headline --out runs/few --collective-users 10
    perfit-cloud lamp run --artefact artefacts/tickets --model MODEL --data tickets --out runs/tickets
    perfit-cloud lamp run --ray local --ray-workers 2 --threads 1 --model MODEL --data tickets --out runs/tickets
    """  # noqa: E501 - \b keeps an example on one line
    from perfit_cloud.lamp.measure import Decoding
    from perfit_cloud.lamp.ray_workers import RayCluster
    from perfit_cloud.lamp.request import LampRequest
    from perfit_cloud.lamp.run import run_lamp
    from perfit_cloud.lamp.sweep import run_sweep

    if not 0 <= keep_gib <= _MOST_GIB:
        raise InvalidInput(f"--keep-gib should be from 0 to {_MOST_GIB}")
    if ray is None and ray_workers is not None:
        raise InvalidInput("--ray-workers goes with --ray")
    if ray is not None and device_map != "none":
        raise InvalidInput("--ray gives each worker one device; leave out --device-map")
    cluster = None if ray is None else RayCluster(ray, ray_workers)
    request = LampRequest(
        task=task,
        model=model,
        data=data,
        out=out,
        artefact=artefact,
        lora=lora,
        lora_layers=lora_layers,
        preset=preset,
        prompts=prompts,
        chat=chat,
        schedule=schedule,
        users=users,
        examples=examples,
        queries=queries,
        modes=None if modes is None else tuple(name.strip() for name in modes.split(",")),
        reuse=reuse,
        collective_users=collective_users,
        collective_group=collective_group,
        method=method,
        k=k,
        profile_model=profile_model,
        strength=strength,
        histories=histories,
        layers=layers_of(layers),
        positions=positions,
        collective_rank=collective_rank,
        personal_rank=personal_rank,
        batch_size=batch_size,
        collective_epochs=collective_epochs,
        collective_learning_rate=collective_lr,
        epochs=epochs,
        learning_rate=lr,
        drift=drift,
        seed=seed,
        decoding=Decoding(temperature=temperature, seed=seed),
        frequency_penalty=frequency_penalty,
        users_together=users_together,
        keep_bytes=int(keep_gib * _GIB),
        threads=threads,
        dtype=dtype,
        device=device,
        placement=placement_of(device_map, max_memory),
    )
    try:
        with stopping() as stop:
            if sweep is None:
                runs = [run_lamp(request, stop=stop, ray=cluster)]
            else:
                runs = run_sweep(request, sweep, stop=stop, ray=cluster)
    except Cancelled as error:
        typer.echo(f"perfit-cloud: {error}", err=True)
        raise typer.Exit(INTERRUPTED) from None
    summaries = [each.summary() for each in runs]
    if as_json:
        typer.echo(json.dumps(summaries[0] if sweep is None else summaries, ensure_ascii=False))
        return
    for each, summary in zip(runs, summaries, strict=True):
        rows = {"loss, nats a token": summary["loss"], **summary["metrics"]}
        cells = [[name, *(_figure(values[mode]) for mode in each.modes)] for name, values in rows.items()]
        how = f", {each.settings['schedule']} schedule" if "schedule" in each.settings else ""
        typer.echo(f"{each.folder} ({len(each.users)} users{how})")
        typer.echo("\n".join(aligned_table(["", *each.modes], cells)))
        for mode, of in summary.get("drift", {}).items():
            typer.echo(
                f"drift, {mode}: {of['nats']:+.4f} nats a token, {of['unchanged']:.1%} of answers unchanged "
                f"on {of['prompts']} prompts"
            )


def _figure(value: float | None) -> str:
    """A summary holds None for what is no number."""
    return "–" if value is None else f"{value:.4f}"
