"""`perfit status`, `profiles`, `export`, `undo` and `passphrase`: the profile itself."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from perfit_device.cli.common import JsonFlag, ProfileOption, Session, TaskOption, say
from perfit_device.cli.prompts import ask_passphrase
from perfit_shared.errors import ConfigError, InvalidInput, exit_code
from perfit_shared.terminal import clean

if TYPE_CHECKING:
    from perfit_device.operations.status import Status
    from perfit_device.personal import Version, Versions


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

    with session.open_profile() as opened, opened.vault() as vault:
        cloud_id, name = opened.trained(task)
        metadata = shift_files.export(vault, cloud_id, name, shift, force=force)
    if session.json:
        session.emit({"task": name, "version": metadata.get("version"), "file": str(shift)})
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

    Once more, and the one before that; the last ten versions are kept. What is undone stays until the next
    update, and --to brings it back. An update that is half-done is dropped, since it went on from the
    version that is taken back. The cloud is not asked.

    \b
    perfit undo
    perfit undo --list
    perfit undo --to 3
    """
    session = Session.of(context, profile=profile, json=json_)
    if show and to is not None:
        raise InvalidInput("--list changes nothing; leave it or --to out")
    with session.open_profile() as opened:
        from perfit_device.operations import versions  # behind the vault, whose key derivation takes 64 MiB

        if show:
            _list_versions(session, *versions.read(opened, task))
            return
        name, version = versions.undo(opened, task, to)
    if session.json:
        session.emit({"task": name, "updates": version.updates, "number": version.number})
    say(
        f"{name}: your shift is version {version.number} again, of {version.updates} updates; "
        "`perfit undo --list` shows the others"
    )


def _list_versions(session: Session, name: str, versions: Versions) -> None:
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


def profiles(context: typer.Context, *, json_: JsonFlag = False) -> None:
    """List the profiles on this device; a star marks the one that commands use.

    --profile or PERFIT_PROFILE chooses another.
    """
    session = Session.of(context, json=json_)
    settings = session.settings
    names = settings.profiles()
    if session.json:
        session.emit([{"name": name, "current": name == settings.profile} for name in names])
        return
    for name in names:
        print(f"{'*' if name == settings.profile else ' '} {name}")
    if not names:
        say("there is no profile yet; `perfit enroll INVITE` makes one")


def status(context: typer.Context, *, profile: ProfileOption = None, json_: JsonFlag = False) -> None:
    """Show the profile: its cloud, certificate, tasks, examples and shifts.

    The exit code is 3 when the cloud cannot be reached, and 4 when it refuses this device.
    """
    session = Session.of(context, profile=profile, json=json_)
    with session.open_profile() as opened:
        from perfit_device.operations import status as operation  # behind the vault, as in `undo`

        found, trouble = operation.status(opened)
    if session.json:
        session.emit(asdict(found))
    else:
        _print_status(found)
    if trouble is not None:
        raise typer.Exit(exit_code(trouble))


def _print_status(found: Status) -> None:
    print(f"profile      {found.profile}\nvault        {found.vault}")
    print(f"cloud        {found.address or 'not enrolled'}, {found.cloud}")
    if found.certificate_until:
        print(f"identity     {clean(found.identity or '')}, certified until {found.certificate_until}")
    for name, task in found.tasks.items():
        parts = [f"{task.examples} examples"]
        if task.updates:
            parts.append(f"personal shift of {task.updates} updates")
            parts.append(f"version {task.current}, {len(task.versions)} kept")
        else:
            parts.append("no personal shift")
        if task.half_done:
            parts.append(f"an update waits at step {task.half_done}; `perfit update` resumes it")
        print(f"{name}: {', '.join(parts)}")


def passphrase(context: typer.Context, profile: ProfileOption = None) -> None:
    """Change the vault's passphrase; one key is rewrapped, nothing is re-encrypted.

    PERFIT_PASSPHRASE is the old one, PERFIT_NEW_PASSPHRASE the new one; both are asked for
    on a terminal when not set.
    """
    session = Session.of(context, profile=profile)
    with session.open_profile() as opened:
        new = session.settings.new_passphrase() or ask_passphrase("New passphrase", confirm=True)
        if new == session.settings.passphrase():
            raise ConfigError("the new passphrase is the old one; choose another")
        opened.change_passphrase(new)
    say("the passphrase is changed")
