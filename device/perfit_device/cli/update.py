"""`perfit update`: train the personal shift."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated

import typer

from perfit_device import process_limits
from perfit_device.cli.common import JsonFlag, ProfileOption, Session, TaskOption, say
from perfit_device.cli.progress import Progress
from perfit_shared.errors import KEPT_OUT, InvalidInput

if TYPE_CHECKING:
    from perfit_device.cloud.client import Cloud
    from perfit_device.operations.update import Updated
    from perfit_device.training.update import Plan, Result


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
        bool, typer.Option("--fresh", help="Start from the seed: unlearn what was forgotten.")
    ] = False,
    again: Annotated[
        bool, typer.Option("--again", help="Train also when nothing is new since the last update.")
    ] = False,
    anyway: Annotated[
        bool, typer.Option("--anyway", help="Take the new version even where the gate finds it no better.")
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
    """
    session = Session.of(context, profile=profile, json=json)
    _check_seconds("--checkpoint", checkpoint)
    _check_seconds("--patience", patience)
    process_limits.limit_process()
    given = {"epochs": epochs, "learning_rate": lr, "batch_size": batch_size, "seed": seed}
    progress = Progress()
    with progress, session.open_profile(notify=progress.say) as opened:
        # Behind the vault: the 64 MiB of its key derivation are free again before numpy and gRPC load.
        from perfit_device.operations import update as operation

        request = operation.UpdateRequest(
            task=task,
            settings={key: value for key, value in given.items() if value is not None},
            fresh=fresh,
            again=again,
            anyway=anyway,
            checkpoint_seconds=checkpoint,
            retry_seconds=patience,
        )
        done = operation.update(opened, request, progress.step)
        cloud, _ = opened.connect()
    if session.json:
        session.emit(_as_json(done, cloud))
    if done.result is None:
        say(
            f"nothing is new since the last update of {done.artefact.name}, which was "
            f"{'accepted' if done.was_accepted else 'kept out'}; --again trains all the same"
        )
        return
    _report(done.result, done.plan)
    if not done.result.gate.accepted:
        raise typer.Exit(KEPT_OUT)


def _check_seconds(flag: str, value: float) -> None:
    if not 0 <= value < math.inf:
        raise InvalidInput(f"{flag} should be a number of seconds, 0 or more")


def _as_json(done: Updated, cloud: Cloud) -> dict[str, object]:
    name, result = done.artefact.name, done.result
    if result is None:
        return {"task": name, "steps": 0, "nothing_new": True, "skipped": len(done.skipped)}
    gate = result.gate
    return {
        "task": name,
        "steps": result.steps,
        "epochs": result.epochs,
        "examples": result.examples,
        "loss_first": result.loss_first,
        "loss_last": result.loss_last,
        "best_epoch": result.best_epoch,
        "gate": {
            "before": gate.before,
            "after": gate.after,
            "error": gate.shown.error,
            "examples": len(gate.shown.after),
            "folds": gate.folds,
            "accepted": gate.accepted,
        },
        "seconds": result.seconds,
        "bytes_up": cloud.bytes_up,
        "bytes_down": cloud.bytes_down,
        "resumed_from": result.resumed_from,
        "skipped": len(done.skipped),
    }


def _report(result: Result, plan: Plan) -> None:
    gate, shown = result.gate, result.gate.shown
    losses = [f"{gate.before:.4f} with your shift as it was", f"{gate.after:.4f} with the new one"]
    if plan.anew and gate.current is None:
        losses[0] = f"{gate.before:.4f} with the seed"
    if gate.recorded is not None:
        losses.insert(1, f"{gate.recorded:.4f} with your shift as it was")
    figures = f"loss on {len(shown.after)} examples that none was trained on {', '.join(losses)}"
    detail = (
        f"{shown.gain:.4f} ± {shown.error:.4f} nats a token better; the best epoch was {result.best_epoch} "
        f"of {plan.epochs}"
    )
    if gate.accepted:
        say(f"accepted: {figures} ({detail}); `perfit undo` takes this back")
    elif plan.fresh:
        say(f"kept out: {figures}; your shift stays, and --anyway unlearns what you forgot all the same")
    else:
        say(f"kept out: {figures}; your shift stays as it was ({detail})")
