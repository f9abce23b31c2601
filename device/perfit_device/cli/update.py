"""`perfit update`: train the personal shift."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import typer

from perfit_device import process_limits
from perfit_device.cli.common import JsonFlag, ProfileOption, Session, TaskOption, say, usable_items
from perfit_device.cli.progress import Progress
from perfit_shared.errors import KEPT_OUT, ExamplesRefused, InvalidInput

if TYPE_CHECKING:
    from perfit_device.cloud.client import Cloud
    from perfit_device.cloud.codec import Artefact, CloudInfo
    from perfit_device.cloud.retry import RetryPolicy
    from perfit_device.history import Split
    from perfit_device.training.update import Plan, Result
    from perfit_device.vault.store import Vault


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
    retry_policy: Annotated[
        float, typer.Option("--patience", help="Seconds to wait for a cloud that is gone.", show_default=True)
    ] = 60.0,
    profile: ProfileOption = None,
    json: JsonFlag = False,
) -> None:
    """Train your shift on your history. An interrupted update resumes where it stopped.

    The new version replaces the old one only when it is better on examples it was not trained on; if
    not, the exit code is 5. `perfit undo` takes the version before back. Examples that are too long for
    the cloud are left out and counted.

    \b
    perfit update
    perfit update --task news_headline --epochs 6
    perfit update --fresh
    """
    session = Session.of(context, profile=profile, json=json)
    _check_seconds("--checkpoint", checkpoint)
    _check_seconds("--patience", retry_policy)
    process_limits.stay_small()
    from perfit_device.cloud.retry import RetryPolicy

    wanted = {"epochs": epochs, "learning_rate": lr, "batch_size": batch_size, "seed": seed}
    asked = _Asked(
        settings={key: value for key, value in wanted.items() if value is not None},
        fresh=fresh,
        again=again,
        anyway=anyway,
        checkpoint_seconds=checkpoint,
        retry_policy=RetryPolicy(give_up=retry_policy, tell=say),
    )
    with session.open_vault() as vault, session.open_cloud(vault, asked.retry_policy) as (cloud, info):
        artefact = session.artefact(info, vault, task)
        done = _train(asked, vault, cloud, info, artefact)
    if session.json:
        session.emit(_as_json(artefact, done, cloud))
    if done.result is None:
        say(
            f"nothing is new since the last update of {artefact.name}, which was "
            f"{'accepted' if done.was_accepted else 'kept out'}; --again trains all the same"
        )
        return
    _report(done.result, done.plan)
    if not done.result.gate.accepted:
        raise typer.Exit(KEPT_OUT)


def _check_seconds(flag: str, value: float) -> None:
    if not 0 <= value < math.inf:
        raise InvalidInput(f"{flag} should be a number of seconds, 0 or more")


@dataclass(frozen=True)
class _Asked:
    """What the flags say."""

    settings: dict[str, Any]  # of the plan, those that were given
    fresh: bool
    again: bool
    anyway: bool
    checkpoint_seconds: float
    retry_policy: RetryPolicy


@dataclass(frozen=True)
class _Done:
    """What an update came to. `result` is None where there was nothing new to learn."""

    plan: Plan
    result: Result | None = None
    was_accepted: bool = False  # the update before, where there is no result
    skipped: list[str] = field(default_factory=list)  # names of examples that were left out


def _train(asked: _Asked, vault: Vault, cloud: Cloud, info: CloudInfo, artefact: Artefact) -> _Done:
    """Plan and train, once more without the examples that the cloud turns out to refuse."""
    from perfit_device import history
    from perfit_device.evaluation import refused_among
    from perfit_device.refusals import Refusals
    from perfit_device.training import update as updates

    refusals = Refusals.read(vault, info, artefact)
    items = history.load(vault, artefact.task.name)
    usable = usable_items(items, artefact.task)
    while True:
        fitting = [item for item in usable if item.name not in refusals.names]
        if len(fitting) < len(usable):
            say(f"{len(usable) - len(fitting)} examples are too long for this cloud and are left out")
        try:
            return _train_on(
                asked,
                vault,
                cloud,
                info,
                artefact,
                split=history.split(fitting),
                skipped=[i.name for i in items if i not in fitting],
            )
        except ExamplesRefused as error:
            rest = [item for item in fitting if item.name not in error.names]
            more = refused_among(cloud, artefact.task, rest, retry_policy=asked.retry_policy)
            refusals = refusals.with_names(vault, [*error.names, *(item.name for item in more)])
            updates.forget_checkpoint(vault, refusals.place)  # of a plan with these examples


def _train_on(
    asked: _Asked,
    vault: Vault,
    cloud: Cloud,
    info: CloudInfo,
    artefact: Artefact,
    *,
    split: Split,
    skipped: list[str],
) -> _Done:
    from perfit_device import history, personal
    from perfit_device.training import update as updates
    from perfit_device.training.gradients import Adapting
    from perfit_shared.errors import ShiftMismatch

    place = updates.row_name(info.cloud_id, artefact.name, artefact.task.name)
    plan = _plan(vault, place, artefact, split, asked)
    last = updates.read_finished(vault, place)
    wants_it = asked.again or (asked.anyway and last is not None and not last.accepted)
    if last is not None and not wants_it and (last.plan, last.fingerprint) == (plan, info.fingerprint):
        return _Done(plan, was_accepted=last.accepted, skipped=skipped)
    try:
        current = personal.load(vault, info.cloud_id, artefact)
    except ShiftMismatch:
        if not plan.fresh:
            raise
        current = None  # made for another artefact, so the gate cannot measure it
    progress = Progress()
    with Adapting(cloud, artefact, info.limits, split) as source:
        if current is not None and not plan.fresh:
            start = current.tensors
        else:
            start = asked.retry_policy.call(lambda: cloud.fetch_seed(artefact))
        run = updates.Update(
            vault,
            info.cloud_id,
            artefact,
            plan,
            start=start,
            current=current,
            forgotten=history.forgotten(vault, artefact.task.name),
            fingerprint=info.fingerprint,
            anyway=asked.anyway,
            gradient=source.gradient,
            evaluate=source.loss,
            retry_policy=asked.retry_policy,
            checkpoint_seconds=asked.checkpoint_seconds,
            progress=progress.step,
        )
        say(
            f"{artefact.name}: {plan.examples} examples, {plan.epochs} epochs, {plan.steps} steps"
            + (f", resuming after step {run.resumed_from}" if run.resumed_from else "")
        )
        try:
            return _Done(plan, run.run(), skipped=skipped)
        except KeyboardInterrupt:
            progress.end()
            say(f"stopped after step {run.step} of {plan.steps}; `perfit update` resumes there")
            raise
        finally:
            progress.end()


def _plan(vault: Vault, place: str, artefact: Artefact, split: Split, asked: _Asked) -> Plan:
    """The half-done plan if it still holds and nothing else is asked for, else a new one."""
    from dataclasses import asdict, replace

    from perfit_device.training import update as updates
    from perfit_shared.training import Overrides, schedule_for

    wanted = asked.settings
    now = {"history": split.digest(), "version": artefact.version, "examples": len(split.train)}
    if "batch_size" in wanted:  # as plans hold it: no batch is larger than the history
        wanted = wanted | {"batch_size": min(wanted["batch_size"], len(split.train))}
    kept = updates.read_checkpoint(vault, place)
    if kept is not None:
        old = asdict(kept.schedule)
        again = replace(kept.schedule, **wanted, fresh=asked.fresh or kept.schedule.fresh)
        if {key: old[key] for key in now} == now and again == kept.schedule:
            return kept.schedule
        reason = "you asked for other settings"
        if old["version"] != now["version"]:
            reason = "the cloud's artefact changed"
        if old["history"] != now["history"]:
            reason = "your history changed"
        say(f"the update that was interrupted cannot be resumed, since {reason}; starting anew")
    schedule = schedule_for("device", artefact, len(split.train), Overrides(**wanted))
    return updates.Plan(
        **asdict(schedule), fresh=asked.fresh, history=split.digest(), version=artefact.version
    )


def _as_json(artefact: Artefact, done: _Done, cloud: Cloud) -> dict[str, object]:
    result = done.result
    if result is None:
        return {"task": artefact.name, "steps": 0, "nothing_new": True, "skipped": len(done.skipped)}
    return {
        "task": artefact.name,
        "steps": result.steps,
        "epochs": result.epochs,
        "examples": result.examples,
        "loss_first": result.loss_first,
        "loss_last": result.loss_last,
        "gate": {
            "before": result.gate.before,
            "after": result.gate.after,
            "accepted": result.gate.accepted,
        },
        "seconds": result.seconds,
        "bytes_up": cloud.bytes_up,
        "bytes_down": cloud.bytes_down,
        "resumed_from": result.resumed_from,
        "skipped": len(done.skipped),
    }


def _report(result: Result, plan: Plan) -> None:
    gate = result.gate
    figures = (
        f"loss on the gate's examples {gate.before:.4f} with your shift as it was, "
        f"{gate.after:.4f} with the new one"
    )
    if gate.accepted:
        say(f"accepted: {figures}; `perfit undo` takes this back")
    elif plan.fresh:
        say(f"kept out: {figures}; your shift stays, and --anyway unlearns what you forgot all the same")
    else:
        say(f"kept out: {figures}; your shift stays as it was")
