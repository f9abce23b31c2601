"""`perfit update`: train the personal shift."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated

import typer

from perfit_device.cli.common import JsonFlag, ProfileOption, Session, TaskOption, say
from perfit_device.cli.progress import Progress
from perfit_shared.errors import KEPT_OUT, InvalidInput

if TYPE_CHECKING:
    from perfit_device.operations.update import Trained, Updated


def update(
    context: typer.Context,
    *,
    task: TaskOption = None,
    epochs: Annotated[
        int | None,
        typer.Option(
            "--epochs", help="Passes over the history.  [default: the artefact's, more for short histories]"
        ),
    ] = None,
    lr: Annotated[
        float | None, typer.Option("--lr", help="Peak learning rate.  [default: the artefact's]")
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            "--batch-size", help="Examples a step.  [default: the artefact's, fewer for short histories]"
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Of the examples' order.  [default: 0]")] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Start from the seed; the gate compares with your shift as it is.")
    ] = False,
    again: Annotated[
        bool, typer.Option("--again", help="Train also when nothing is new since the last update.")
    ] = False,
    anyway: Annotated[
        bool, typer.Option("--anyway", help="Take the new version even where the gate finds it no better.")
    ] = False,
    auto: Annotated[
        bool,
        typer.Option("--auto", help="Only when it is due: enough is new, and the machine idle and on power."),
    ] = False,
    checkpoint: Annotated[
        float, typer.Option("--checkpoint", help="Seconds between checkpoints.", show_default=True)
    ] = 30.0,
    patience: Annotated[
        float, typer.Option("--patience", help="Seconds to wait for a cloud that is gone.", show_default=True)
    ] = 60.0,
    profile: ProfileOption = None,
    json: JsonFlag = False,
) -> None:
    """Train your shift on your history. An interrupted update resumes where it stopped.

    The new version replaces the old one only when it is better on examples it was not trained on, by more
    than chance explains; if not, the exit code is 5. `perfit undo` takes the version before back. Examples
    that are too long for the cloud are left out and counted.

    \b
    perfit update
    perfit update --task news_headline --epochs 6
    perfit update --fresh
    perfit update --auto
    """
    session = Session.of(context, profile=profile, json=json)
    if auto:
        if fresh or again or anyway or not {epochs, lr, batch_size, seed} <= {None}:
            raise InvalidInput("--auto decides by itself; only --task and --profile go with it")
        from perfit_device.cli.automatic import update_when_due

        update_when_due(session, task)
        return
    _check_seconds("--checkpoint", checkpoint)
    _check_seconds("--patience", patience)
    from perfit_device import process_limits

    process_limits.limit_process()
    given = {"epochs": epochs, "learning_rate": lr, "batch_size": batch_size, "seed": seed}
    from perfit_device.operations.update import Update

    progress = Progress()

    operation = Update(
        task=task,
        settings={key: value for key, value in given.items() if value is not None},
        fresh=fresh,
        again=again,
        anyway=anyway,
        checkpoint_seconds=checkpoint,
        retry_seconds=patience,
    )
    with progress:
        done = session.perform(operation, progress.step_or_note)
    if session.json:
        session.emit(_as_json(done))
    if done.trained is None:
        say(
            f"nothing is new since the last update of {done.artefact}, which was "
            f"{'accepted' if done.was_accepted else 'kept out'}; --again trains all the same"
        )
        return
    _report(done.trained)
    if not done.trained.gate.accepted:
        raise typer.Exit(KEPT_OUT)


def _check_seconds(flag: str, value: float) -> None:
    if not 0 <= value < math.inf:
        raise InvalidInput(f"{flag} should be a number of seconds, 0 or more")


def _as_json(done: Updated) -> dict[str, object]:
    trained = done.trained
    if trained is None:
        return {"task": done.artefact, "steps": 0, "nothing_new": True, "skipped": done.skipped}
    gate = trained.gate
    return {
        "task": done.artefact,
        "steps": trained.steps,
        "epochs": trained.epochs,
        "examples": trained.examples,
        "loss_first": trained.loss_first,
        "loss_last": trained.loss_last,
        "best_epoch": trained.best_epoch,
        "gate": {
            "before": gate.before,
            "after": gate.after,
            "error": gate.error,
            "examples": gate.examples,
            "folds": gate.folds,
            "accepted": gate.accepted,
        },
        "seconds": trained.seconds,
        "bytes_up": done.bytes_up,
        "bytes_down": done.bytes_down,
        "resumed_from": trained.resumed_from,
        "skipped": done.skipped,
    }


def _report(trained: Trained) -> None:
    gate = trained.gate
    losses = [f"{gate.before:.4f} with your shift as it was", f"{gate.after:.4f} with the new one"]
    if gate.is_of_seed:
        losses[0] = f"{gate.before:.4f} with the seed"
    if gate.recorded is not None:
        losses.insert(1, f"{gate.recorded:.4f} with your shift as it was")
    figures = f"loss on {gate.examples} examples that none was trained on {', '.join(losses)}"
    detail = (
        f"{gate.gain:.4f} ± {gate.error:.4f} nats a token better; the best epoch was {trained.best_epoch} "
        f"of {trained.epochs}"
    )
    if gate.accepted:
        say(f"accepted: {figures} ({detail}); `perfit undo` takes this back")
    elif trained.fresh:
        say(f"kept out: {figures}; your shift stays, and --anyway unlearns what you forgot all the same")
    else:
        say(f"kept out: {figures}; your shift stays as it was ({detail})")
