"""`perfit status`, `export`, `undo` and `passphrase`: the profile itself."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from perfit_device.cli.common import JsonFlag, ProfileOption, Session, TaskOption, say
from perfit_device.cli.common import show as show_event
from perfit_device.cli.prompts import ask_passphrase
from perfit_shared.errors import InvalidInput

if TYPE_CHECKING:
    from perfit_device.shift_versions import Version, Versions


def export(
    context: typer.Context,
    *,
    shift: Annotated[Path, typer.Option("--shift", metavar="FILE", help="Where to write it.")],
    task: TaskOption = None,
    force: Annotated[bool, typer.Option("--force", help="Replace FILE if it exists.")] = False,
    profile: ProfileOption = None,
    json_: JsonFlag = False,
) -> None:
    """Write your personal shift to a file, unsealed: who has it can answer in your way.

    The cloud is not asked.

    \b
    perfit export --shift mine.shift --task news_headline
    """
    session = Session.of(context, profile=profile, json=json_)
    from perfit_device import shift_files
    from perfit_device.operations.shifts import ExportShift

    exported = session.perform(ExportShift(task))
    shift_files.write(shift, exported.data, force=force)
    if session.json:
        session.emit({"task": exported.artefact, "version": exported.version, "file": str(shift)})
    say(f"wrote {shift}; it is not sealed, so keep it where you would keep a diary")


def undo(
    context: typer.Context,
    *,
    task: TaskOption = None,
    to: Annotated[
        int | None,
        typer.Option("--to", metavar="NUMBER", help="Go to this version, an earlier or a later one."),
    ] = None,
    show: Annotated[bool, typer.Option("--list", help="Show the versions, and change nothing.")] = False,
    profile: ProfileOption = None,
    json_: JsonFlag = False,
) -> None:
    """Take back the last update: the version before it is your shift again.

    Once more, and the one before that; the last ten versions are kept, what is undone too, and --to brings it
    back. `perfit versions` has more. An update that is half-done is dropped, since it went on from the
    version that is taken back. The cloud is not asked.

    \b
    perfit undo
    perfit undo --list
    perfit undo --to 3
    """
    session = Session.of(context, profile=profile, json=json_)
    if show and to is not None:
        raise InvalidInput("--list changes nothing; leave it or --to out")
    from perfit_device.operations.versions import ListVersions

    if show:
        listed = session.perform(ListVersions(task))
        list_versions(session, listed.artefact, listed.versions)
        return
    use_version(session, task, to)


def use_version(session: Session, task: str | None, to: int | None) -> None:
    """Make this version the current one, or the one before where `to` is None."""
    from perfit_device.operations.versions import Undo

    done = session.perform(Undo(task, to))
    name, version = done.artefact, done.version
    if session.json:
        session.emit({"task": name, "updates": version.updates, "number": version.number})
    say(
        f"{name}: your shift is version {version.number} again, of {version.updates} updates; "
        "`perfit versions list` shows the others"
    )


def list_versions(session: Session, name: str, versions: Versions) -> None:
    """Oldest first; a star marks the current one."""
    if session.json:
        listed = [asdict(version) | {"current": version is versions.now} for version in versions.kept]
        session.emit({"task": name, "versions": listed})
        return
    print(
        f"{'':<2}{'':>4}  {'date':<20}  {'examples':>8}  {'loss in training':<17}  {'loss at the gate':<17}"
    )
    for version in versions.kept:
        print(_line_of(version, star="*" if version is versions.now else " "))


def _line_of(version: Version, *, star: str) -> str:
    learned = version.learned
    examples = "-" if learned.examples is None else str(learned.examples)
    training = _from_to(learned.train_before, learned.train_after)
    gate = _from_to(learned.gate_before, learned.gate_after)
    date = version.date or "-"
    return f"{star} {version.number:>4}  {date:<20}  {examples:>8}  {training:<17}  {gate:<17}".rstrip()


def _from_to(before: float | None, after: float | None) -> str:
    return "-" if before is None or after is None else f"{before:.4f} → {after:.4f}"


def status(context: typer.Context, *, profile: ProfileOption = None, json_: JsonFlag = False) -> None:
    """Show the profile at a glance: its cloud, and for each task which way is better and what is new.

    Losses are in nats a token, lower is better: of the last `perfit evaluate`, else of the last update.
    The exit code is 3 when the cloud cannot be reached, and 4 when it refuses this device.
    """
    session = Session.of(context, profile=profile, json=json_)
    from perfit_device.operations.status import ProfileStatus

    found = session.perform(ProfileStatus())
    if session.json:
        session.emit({key: value for key, value in asdict(found).items() if key != "exit_code"})
    else:
        from perfit_device.cli.glance import print_status

        print_status(found)
    if found.exit_code:
        raise typer.Exit(found.exit_code)


def passphrase(context: typer.Context, profile: ProfileOption = None) -> None:
    """Change the vault's passphrase; one key is rewrapped, nothing is re-encrypted.

    PERFIT_PASSPHRASE is the old one, PERFIT_NEW_PASSPHRASE the new one; both are asked for
    on a terminal when not set.
    """
    session = Session.of(context, profile=profile)
    from perfit_device.operations.passphrase import ChangePassphrase, VaultLock

    settings = session.settings
    with session.performer() as performer:
        is_typed = performer.perform(VaultLock()) == "passphrase"
        old = session.passphrase() if is_typed else None
        new = settings.new_passphrase() or ask_passphrase("New passphrase", confirm=True)
        performer.perform(ChangePassphrase(old, new), show_event)
    say("the passphrase is changed")
