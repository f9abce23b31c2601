"""`perfit-cloud artefact`: shifts to and from other programs' formats."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from perfit_cloud.cli.common import MODEL_HELP
from perfit_shared.errors import InvalidInput

if TYPE_CHECKING:
    from perfit_cloud.model.pyreft import Checkpoint

app = typer.Typer(
    no_args_is_help=True,
    help="Exchange collective and personal shifts with pyreft, which PerFit's own code builds on.",
)


class Format(StrEnum):
    PYREFT = "pyreft"  # a folder as pyreft 0.1.0 saves it


class Which(StrEnum):
    COLLECTIVE = "collective"
    PERSONAL = "personal"
    BOTH = "both"


FormatOption = Annotated[Format, typer.Option("--format", help="pyreft 0.1.0's checkpoint folder.")]


@app.command("export")
def export_(
    artefact: Annotated[Path, typer.Option(help="Artefact folder.")],
    out: Annotated[Path, typer.Option(help="Folder for the checkpoint; it should not exist, or be empty.")],
    form: FormatOption = Format.PYREFT,
    shift: Annotated[
        Which, typer.Option(help="What to write: the collective shift, the personal one, or both in order.")
    ] = Which.BOTH,
    personal: Annotated[
        Path | None, typer.Option(help="A personal shift from `perfit export --shift`; else the seed.")
    ] = None,
) -> None:
    """Write a shift as a checkpoint that pyreft's own loader reads; every tensor keeps every bit.

    With both, each layer has two interventions, and pyreft runs the collective one first, as perfit
    does. pyreft is told positions with each batch: give it those of the artefact for every
    intervention, first and last tokens in one list, since they share weights.

    pyreft 0.1.0 loads weight and bias as bfloat16, whatever is in the file. For a float32 model, call
    learned_source.float() on every intervention and load its file again.

    \b
    perfit-cloud artefact export --artefact artefacts/news_headline --out news_headline.pyreft
    perfit-cloud artefact export --artefact artefacts/news_headline --personal mine.safetensors --out mine.pyreft
    """  # noqa: E501 - \b keeps an example on one line
    from perfit_cloud.model.artefacts import Artefact
    from perfit_cloud.model.pyreft import read_personal, write_checkpoint

    if personal is not None and shift is Which.COLLECTIVE:
        raise InvalidInput("--personal is no part of the collective shift; leave it out, or --shift")
    loaded = Artefact.load(artefact)
    second = loaded.seed if personal is None else read_personal(personal, loaded)
    shifts = {
        Which.COLLECTIVE: [loaded.collective],
        Which.PERSONAL: [second],
        Which.BOTH: [loaded.collective, second],
    }[shift]
    # A personal shift is its owner's alone.
    _empty_folder(out, private=personal is not None)
    write_checkpoint(out, shifts)
    typer.echo(
        f"{out}: {len(shifts)} intervention{'s' * (len(shifts) > 1)} after each of blocks "
        f"{_list(loaded.spec.layers)}, positions {loaded.spec.positions}"
    )


@app.command("import")
def import_(  # noqa: PLR0917 - typer's way; all are options
    checkpoint: Annotated[Path, typer.Option(help="Folder with config.json and intkey_….bin files.")],
    out: Annotated[Path, typer.Option(help="Folder for the artefact; with --artefact, a shift file.")],
    form: FormatOption = Format.PYREFT,
    model: Annotated[str | None, typer.Option(help=MODEL_HELP)] = None,
    task: Annotated[str | None, typer.Option(help="Task, for example news_headline or chat.")] = None,
    positions: Annotated[str | None, typer.Option(help='Prompt tokens it was trained on: "f7+l7".')] = None,
    shift: Annotated[
        Which | None,
        typer.Option(
            help="What the checkpoint holds; two interventions a layer are both, one is the collective shift."
        ),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Dataset folder whose task.json has the prompt it was trained with.")
    ] = None,
    personal_rank: Annotated[
        int | None, typer.Option(help="Rank of a seed that the checkpoint lacks; the preset's.")
    ] = None,
    device_epochs: Annotated[int | None, typer.Option(help="Passes over a history; the preset's.")] = None,
    device_lr: Annotated[float | None, typer.Option(help="Peak rate on devices; the preset's.")] = None,
    artefact: Annotated[
        Path | None, typer.Option(help="Take the personal shift of a user of this artefact instead.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Make an artefact, or one user's shift file, of a checkpoint that pyreft saved.

    pyreft must have trained it with one set of weights for first and last tokens (share_weights):
    the folder does not say, and with separate weights it looks just like a collective and a
    personal shift. What the checkpoint lacks starts as the identity. Rotations that were rounded
    to bfloat16 are made orthonormal again, with a message; all else keeps every bit.

    \b
    perfit-cloud artefact import --checkpoint run/stage1 --model newslm --task news_headline --positions l7 --out artefacts/news_headline
    perfit-cloud artefact import --checkpoint run/user7 --artefact artefacts/news_headline --out user7.safetensors
    """  # noqa: E501 - \b keeps an example on one line
    from perfit_cloud.model.pyreft import read_checkpoint

    read = read_checkpoint(checkpoint)
    if artefact is not None:
        new = [
            ("model", model),
            ("task", task),
            ("positions", positions),
            ("shift", shift),
            ("data", data),
            ("personal-rank", personal_rank),
            ("device-epochs", device_epochs),
            ("device-lr", device_lr),
        ]
        if given := [f"--{name}" for name, value in new if value is not None]:
            raise InvalidInput(f"{given[0]} makes an artefact; leave it out, or --artefact")
        result = _import_personal(read, artefact, out)
    elif model is None or task is None or positions is None:
        # The checkpoint does not say which positions, and a wrong guess would spoil it in silence.
        raise InvalidInput("give --model, --task and --positions for an artefact, or --artefact for a shift")
    else:
        result = _import_artefact(
            read,
            out,
            model=model,
            task=task,
            positions=positions,
            shift=shift,
            data=data,
            personal_rank=personal_rank,
            epochs=device_epochs,
            learning_rate=device_lr,
        )
    if read.mended:
        typer.echo(
            f"perfit-cloud: rotations were orthonormal to {read.mended:.1e} (Frobenius) only; "
            "replaced by the nearest orthonormal ones",
            err=True,
        )
    typer.echo(json.dumps(result) if as_json else _line(result))


def _import_personal(read: Checkpoint, artefact: Path, out: Path) -> dict[str, Any]:
    """One user's shift, as `perfit import --shift` takes it."""
    from perfit_cloud.model.artefacts import Artefact
    from perfit_cloud.model.pyreft import personal_file

    if out.exists():
        raise InvalidInput(f"{out} exists; choose another --out")
    loaded = Artefact.load(artefact)
    payload = personal_file(read, loaded)
    out.touch(mode=0o600)
    out.write_bytes(payload)
    return {
        "out": str(out),
        "name": loaded.name,
        "version": loaded.version,
        "layers": list(loaded.spec.layers),
        "rank": loaded.spec.personal_rank,
        "mended": read.mended,
    }


def _import_artefact(
    read: Checkpoint,
    out: Path,
    *,
    model: str,
    task: str,
    positions: str,
    shift: Which | None,
    data: Path | None,
    personal_rank: int | None,
    epochs: int | None,
    learning_rate: float | None,
) -> dict[str, Any]:
    from perfit_cloud.model.pyreft import describe_model, to_artefact
    from perfit_shared.tasks import load_task, task_named

    known = task_named(task) if data is None else load_task(data, task)
    known = known.resolved(False)  # pyreft trains on texts
    made = to_artefact(
        read,
        model=describe_model(model),
        task=known,
        positions=positions,
        which=shift and shift.value,
        personal_rank=personal_rank,
        epochs=epochs,
        learning_rate=learning_rate,
    )
    _empty_folder(out)
    made.save(out)
    return {
        "out": str(out),
        "name": made.name,
        "version": made.version,
        "layers": list(made.spec.layers),
        "positions": made.spec.positions,
        "collective_rank": made.spec.collective_rank,
        "personal_rank": made.spec.personal_rank,
        "device_learning_rate": made.learning_rate,
        "mended": read.mended,
    }


def _empty_folder(out: Path, *, private: bool = False) -> None:
    """Make it. Raises InvalidInput when there is something in its place, or in it."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InvalidInput(f"{out} exists and is no empty folder; choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    if private:
        out.chmod(0o700)


def _line(result: dict[str, Any]) -> str:
    ranks = result.get("rank") or f"{result['collective_rank']}/{result['personal_rank']}"
    return (
        f"{result['out']}: {result['name']}, version {result['version']}, blocks {_list(result['layers'])}, "
        f"rank {ranks}"
    )


def _list(numbers: Any) -> str:
    return ", ".join(map(str, numbers))
