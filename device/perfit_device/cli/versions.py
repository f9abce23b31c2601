"""`perfit versions`: the versions of your shift. The cloud is not asked."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from perfit_device.cli.common import JsonFlag, ProfileOption, Session, TaskOption, say
from perfit_device.cli.profile import list_versions, use_version
from perfit_device.cli.prompts import require_yes
from perfit_shared.errors import InvalidInput

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="The versions of your shift.")

NumberArgument = Annotated[int, typer.Argument(metavar="NUMBER", help="As `perfit versions list` shows it.")]
SomeNumber = Annotated[
    int | None, typer.Argument(metavar="[NUMBER]", help="As `perfit versions list` shows it.")
]


@app.command("list")
def list_(
    context: typer.Context, *, task: TaskOption = None, profile: ProfileOption = None, json: JsonFlag = False
) -> None:
    """Show the versions, oldest first; a star marks the current one.

    \b
    perfit versions list
    """
    session = Session.of(context, profile=profile, json=json)
    from perfit_device.operations.versions import ListVersions

    listed = session.perform(ListVersions(task))
    list_versions(session, listed.artefact, listed.versions)


@app.command("show")
def show(
    context: typer.Context,
    number: SomeNumber = None,
    *,
    task: TaskOption = None,
    profile: ProfileOption = None,
    json: JsonFlag = False,
) -> None:
    """Show what is known of a version; of the current one where no number is given.

    \b
    perfit versions show 3
    """
    session = Session.of(context, profile=profile, json=json)
    from perfit_device.operations.versions import ShowVersion

    shown = session.perform(ShowVersion(task, number))
    if session.json:
        session.emit(asdict(shown))
        return
    version, learned = shown.version, shown.version.learned
    losses = {
        "loss in training": (learned.train_before, learned.train_after),
        "loss at the gate": (learned.gate_before, learned.gate_after),
    }
    rows = {
        "task": shown.artefact,
        "version": f"{version.number}{', your shift now' if shown.is_current else ''}",
        "made": ", ".join(filter(None, (version.date or "before perfit wrote it down", version.origin))),
        "updates": version.updates,
        "follows": f"version {version.follows}" if version.follows else "-",
        "artefact": version.artefact_version,
        "examples": ("unknown" if shown.examples is None else f"{shown.examples} trained or judged it")
        + (f", each behind up to {version.behind} others" if version.behind else ""),
        **{
            what: "-" if before is None or after is None else f"{before:.4f} → {after:.4f}"
            for what, (before, after) in losses.items()
        },
        "tensors": f"{shown.numbers} numbers, norm {shown.norm:.3f}",
    }
    for what, value in rows.items():
        print(f"{what:<18}{value}")


@app.command("use")
def use(
    context: typer.Context,
    number: NumberArgument,
    *,
    task: TaskOption = None,
    profile: ProfileOption = None,
    json: JsonFlag = False,
) -> None:
    """Make a version your shift, an earlier or a later one; `perfit undo` is short for the one before.

    A half-done update is dropped, since it went on from another version.

    \b
    perfit versions use 3
    """
    use_version(Session.of(context, profile=profile, json=json), task, number)


@app.command("drop")
def drop(
    context: typer.Context,
    number: SomeNumber = None,
    *,
    everything: Annotated[bool, typer.Option("--all", help="All versions: the whole shift.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    task: TaskOption = None,
    profile: ProfileOption = None,
    json: JsonFlag = False,
) -> None:
    """Delete a version for good; not the current one.

    \b
    perfit versions drop 3 --yes
    perfit versions drop --all --yes
    """
    session = Session.of(context, profile=profile, json=json)
    from perfit_device.operations.versions import DropVersion

    if (number is None) != everything:
        raise InvalidInput("say which version to drop: its number, or --all")
    if not yes:
        require_yes(
            f"this deletes {'all versions' if everything else f'version {number}'} of your shift for good."
        )
    done = session.perform(DropVersion(task, number))
    if session.json:
        session.emit({"task": done.artefact, "dropped": done.count})
    say(f"{done.artefact}: dropped {done.count} versions")
