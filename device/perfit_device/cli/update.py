"""`perfit update`: train the personal shift."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from perfit_device import footprint
from perfit_device.cli.common import JsonFlag, ProfileOption, Session, TaskOption, say

if TYPE_CHECKING:
    from perfit_device.adapting import Adapting
    from perfit_device.cloud import Cloud
    from perfit_device.codec import Artefact, CloudInfo
    from perfit_device.history import Split
    from perfit_device.patience import Patience
    from perfit_device.updates import Plan, Result, Update
    from perfit_device.vault import Vault


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

    The new version replaces the old one only when it is better on examples it was not trained on.

    \b
    perfit update
    perfit update --task news_headline --epochs 6
    perfit update --fresh
    """
    session = Session.of(context, profile=profile, json=json)
    footprint.stay_small()
    from perfit_device.adapting import Adapting
    from perfit_device.patience import Patience

    wanted = {"epochs": epochs, "learning_rate": lr, "batch_size": batch_size, "seed": seed}
    waiting = Patience(give_up=patience, tell=say)
    with session.open_vault() as vault, session.open_cloud(vault, waiting) as (cloud, info):
        artefact = session.artefact(info, vault, task)
        plan, split = _plan(vault, info, artefact, {k: v for k, v in wanted.items() if v is not None}, fresh)
        with Adapting(cloud, artefact, info.limits, split) as source:
            run = _prepare(
                vault, cloud, info, artefact, source, plan=plan,
                patience=waiting, checkpoint_seconds=checkpoint,
            )  # fmt: skip
            say(
                f"{artefact.name}: {plan.examples} examples, {plan.epochs} epochs, {plan.steps} steps"
                + (f", resuming after step {run.resumed_from}" if run.resumed_from else "")
            )
            try:
                result = run.run()
            except KeyboardInterrupt:
                say(f"\nstopped after step {run.step} of {plan.steps}; `perfit update` resumes there")
                raise
            finally:
                _end_progress()
        if session.json:
            session.emit(_as_json(artefact, result, cloud))
        _report(result, plan)


def _plan(
    vault: Vault, info: CloudInfo, artefact: Artefact, wanted: dict[str, Any], fresh: bool
) -> tuple[Plan, Split]:
    """The half-done plan if it still holds and nothing else is asked for, else a new one."""
    from dataclasses import asdict, replace

    from perfit_device import history, updates

    split = history.split(history.load(vault, artefact.task.name))
    now = {"history": split.digest(), "version": artefact.version, "examples": len(split.train)}
    if "batch_size" in wanted:  # as plans hold it: no batch is larger than the history
        wanted = wanted | {"batch_size": min(wanted["batch_size"], len(split.train))}
    place = updates.place_of(info.cloud_id, artefact.name, artefact.task.name)
    kept = updates.read_checkpoint(vault, place)
    if kept is not None:
        old = asdict(kept.schedule)
        again = replace(kept.schedule, **wanted, fresh=fresh or kept.schedule.fresh)
        if {key: old[key] for key in now} == now and again == kept.schedule:
            return kept.schedule, split
        reason = (
            "your history changed" if old["history"] != now["history"]
            else "the cloud's artefact changed" if old["version"] != now["version"]
            else "you asked for other settings"
        )  # fmt: skip
        say(f"the update that was interrupted cannot be resumed, since {reason}; starting anew")
    epochs, batch_size = updates.schedule(
        artefact, len(split.train), epochs=wanted.get("epochs"), batch_size=wanted.get("batch_size")
    )
    plan = updates.Plan(
        epochs=epochs,
        learning_rate=float(wanted.get("learning_rate", artefact.learning_rate)),
        batch_size=batch_size,
        seed=int(wanted.get("seed", 0)),
        fresh=fresh,
        history=split.digest(),
        version=artefact.version,
        examples=len(split.train),
    )
    return plan, split


def _prepare(
    vault: Vault,
    cloud: Cloud,
    info: CloudInfo,
    artefact: Artefact,
    source: Adapting,
    *,
    plan: Plan,
    patience: Patience,
    checkpoint_seconds: float,
) -> Update:
    from perfit_device import personal
    from perfit_device.updates import Update

    mine = None if plan.fresh else personal.load(vault, info.cloud_id, artefact)
    return Update(
        vault, info.cloud_id, artefact, plan,
        start=mine.tensors if mine is not None else patience.call(lambda: cloud.fetch_seed(artefact)),
        updates=mine.updates if mine is not None else 0,
        gradient=source.gradient,
        evaluate=source.loss,
        patience=patience,
        checkpoint_seconds=checkpoint_seconds,
        progress=_progress,
    )  # fmt: skip


def _progress(step: int, steps: int, loss: float) -> None:
    """One line that renews itself on a terminal; a line now and then elsewhere."""
    line = f"step {step}/{steps}  loss {loss:.4f}"
    if sys.stderr.isatty():
        print(f"\r{line:<40}", end="", file=sys.stderr, flush=True)
    elif step in {1, steps} or step % max(1, steps // 10) == 0:
        say(line)


def _end_progress() -> None:
    if sys.stderr.isatty():
        print(file=sys.stderr)


def _as_json(artefact: Artefact, result: Result, cloud: Cloud) -> dict[str, object]:
    return {
        "task": artefact.name, "steps": result.steps, "epochs": result.epochs,
        "examples": result.examples, "loss_first": result.loss_first, "loss_last": result.loss_last,
        "gate": {
            "before": result.gate.before, "after": result.gate.after, "accepted": result.gate.accepted,
        },
        "seconds": result.seconds, "bytes_up": cloud.bytes_up, "bytes_down": cloud.bytes_down,
        "resumed_from": result.resumed_from,
    }  # fmt: skip


def _report(result: Result, plan: Plan) -> None:
    gate = result.gate
    figures = f"loss on the gate's examples {gate.before:.4f} before, {gate.after:.4f} after"
    if gate.accepted:
        say(f"accepted: {figures}; your shift is the new version")
    elif plan.fresh:
        say(f"kept out: {figures}; fresh training did not beat the seed, so your shift stays as it was")
    else:
        say(f"kept out: {figures}; your shift stays as it was")
