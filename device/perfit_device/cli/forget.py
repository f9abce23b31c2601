"""`perfit forget`, which is `perfit history forget` as well."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from perfit_device.cli.common import JsonFlag, ProfileOption, Session, say
from perfit_device.cli.progress import Progress
from perfit_device.cli.prompts import require_yes
from perfit_shared.errors import InvalidInput

if TYPE_CHECKING:
    from perfit_device.operations.forgetting import Forgotten, KnowingVersion, Known


def forget(
    context: typer.Context,
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[EXAMPLE]...", help="As `perfit history list` shows them.")
    ] = None,
    *,
    task: Annotated[
        str | None, typer.Option("--task", metavar="NAME", help="All examples of a task.")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="All examples of all tasks.")] = False,
    retrain: Annotated[
        bool, typer.Option("--retrain", help="Train a shift that knows them anew, without them.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    profile: ProfileOption = None,
    json: JsonFlag = False,
) -> None:
    """Forget examples for good: their rows and keys are overwritten in the vault.

    Kept answers with their texts go too, and every earlier version of your shift that was made from
    them. The current version keeps what it learned, unless --retrain trains it anew from the seed; then
    no version is left that knows them.

    \b
    perfit forget 3fa81c02 --yes
    perfit forget 3fa81c02 --retrain --yes
    perfit forget --task news_headline --yes
    """
    session = Session.of(context, profile=profile, json=json)
    from perfit_device.operations.forgetting import Forget, Forgotten, WhatKnows

    if sum((bool(names), task is not None, everything)) != 1:
        raise InvalidInput("say what to forget: names of examples, --task NAME, or --all")
    progress = Progress()

    show = progress.step_or_note
    with progress, session.performer() as performer:
        known = performer.perform(WhatKnows(names or (), task), show)
        if not yes and known.names:
            require_yes(_question(known, retrain=retrain))
        done = performer.perform(Forget(known.names, retrain), show) if known.names else Forgotten(0, (), ())
    _report(session, done)


def _question(known: Known, *, retrain: bool) -> str:
    parts = [f"this forgets {len(known.names)} examples for good"]
    if known.answers:
        parts.append(f"deletes {known.answers} kept answers with their texts")
    gone = [each for each in known.versions if retrain or not each.is_current]
    left = [each for each in known.versions if each.is_current and not retrain]
    if gone:
        parts.append(f"drops {_listed(gone)}")
    if left:
        parts.append(f"leaves {_listed(left)}, which may remember them (--retrain trains it anew)")
    return ", ".join(parts) + "."


def _listed(versions: Sequence[KnowingVersion]) -> str:
    return ", ".join(f"version {each.number} of {each.artefact}" for each in versions)


def _report(session: Session, done: Forgotten) -> None:
    if session.json:
        values = asdict(done)
        session.emit(
            {"forgotten": values.pop("count")} | {key: value for key, value in values.items() if value}
        )
    say(f"forgot {done.count} examples")
    for each in done.left:
        how = "was trained on them" if each.is_certain else "may have been trained on them"
        say(
            f"version {each.number} of {each.artefact}, your shift now, {how} and keeps what it learned "
            "until `perfit update --fresh --anyway`"
        )
    if done.dropped:
        say(f"dropped {_listed(done.dropped)}")
    if done.retrained:
        say(f"trained anew without them: {', '.join(done.retrained)}")
