"""`perfit backup`, `restore`, `import`, `migrate` and `unenroll`: what is yours, kept and moved."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from perfit_device.cli.common import JsonFlag, ProfileOption, Session, TaskOption, say
from perfit_device.cli.progress import Progress
from perfit_device.cli.prompts import ask_passphrase, require_yes
from perfit_device.config import Config
from perfit_shared.errors import InvalidInput

if TYPE_CHECKING:
    from perfit_device.operations.migrate import Migrated

_LARGEST_BACKUP = 4 << 30  # bytes, on stdin


def import_(
    context: typer.Context,
    *,
    shift: Annotated[Path, typer.Option("--shift", metavar="FILE", help="As `perfit export` writes it.")],
    profile: ProfileOption = None,
    json: JsonFlag = False,
) -> None:
    """Make an exported shift your own: a new version, which is current. The cloud is not asked.

    It must be for an artefact as the cloud last described it. `perfit undo` takes it back.

    \b
    perfit import --shift mine.shift
    """
    session = Session.of(context, profile=profile, json=json)
    from perfit_device import shift_files
    from perfit_device.operations.shift_import import ImportShift

    data = shift_files.read_bytes(shift)
    done = session.perform(ImportShift(data, str(shift)))
    if session.json:
        session.emit({"task": done.artefact, "number": done.number})
    say(
        f"{done.artefact}: your shift is version {done.number} now, from {shift}; `perfit undo` takes it back"
    )


def backup(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(metavar="FILE", help='Where to write it; "-" is stdout.')],
    *,
    force: Annotated[bool, typer.Option("--force", help="Replace FILE if it exists.")] = False,
    profile: ProfileOption = None,
    json: JsonFlag = False,
) -> None:
    """Write your profile to one sealed file: examples, versions, kept answers and settings.

    The file has a passphrase of its own, which is asked for or stands in PERFIT_BACKUP_PASSPHRASE. The
    identity is not in it: another device enrols by an invite of its own, then restores.

    \b
    perfit backup mine.perfit
    perfit backup - | ssh elsewhere 'cat > mine.perfit'
    """
    session = Session.of(context, profile=profile, json=json)
    from perfit_device.operations.backup import BackUp

    is_stdout = str(file) == "-"
    if is_stdout and (session.json or sys.stdout.isatty()):
        raise InvalidInput("a backup is no text; name a file, or send stdout to one without --json")
    if not is_stdout and not force and file.exists():
        raise InvalidInput(f"{file} exists; choose another name, or --force to replace it")
    passphrase = _passphrase(session, "A passphrase for this backup", confirm=True)
    with _file(file, stdin=False) as path:
        done = session.perform(BackUp(str(path), passphrase, force or is_stdout))
        if is_stdout:
            with path.open("rb") as written:
                shutil.copyfileobj(written, sys.stdout.buffer)
            sys.stdout.buffer.flush()
    if session.json:
        session.emit(asdict(done) | {"file": str(file)})
    answers = f", {done.answers} kept answers" if done.answers else ""
    say(
        f"backed up {done.examples} examples, {done.versions} versions{answers}: {done.bytes >> 10} KiB, "
        "sealed by its own passphrase, and no identity in it"
    )


def restore(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(metavar="FILE", help='A backup; "-" is stdin.')],
    *,
    into: Annotated[
        str | None,
        typer.Option("--into", metavar="NAME", help="A profile that has examples or shifts: add to them."),
    ] = None,
    profile: ProfileOption = None,
    json: JsonFlag = False,
) -> None:
    """Bring a backup into a profile that enrolled by itself: all of it or nothing.

    --into adds to what a profile has: examples that are there already stay once, versions are kept beside,
    and its current version stays the current one.

    \b
    perfit restore mine.perfit
    perfit restore mine.perfit --into default
    """
    session = Session.of(context, profile=profile, json=json)
    if into is not None:
        if profile not in (None, into):
            raise InvalidInput("--profile and --into name two profiles; say one")
        session = Session(into, session.json)
    from perfit_device.operations.backup import Restore

    passphrase = _passphrase(session, "The backup's passphrase")
    with _file(file, stdin=True) as path:
        done = session.perform(Restore(str(path), passphrase, into is not None))
    settings = session.settings
    if done.task is not None and Config.read(settings.config_path).task_of(settings.profile) is None:
        config = Config.read(settings.config_path).with_value(f"task.{settings.profile}", done.task)
        config.write(settings.config_path)
    if session.json:
        session.emit(asdict(done))
    there = f" ({done.known} were there already)" if done.known else ""
    answers = f", {done.answers} kept answers" if done.answers else ""
    say(f"restored {done.examples} examples{there}, {done.versions} versions{answers}")
    for name in done.other_cloud:
        say(
            f"the shift for {name} belongs to another cloud than this profile is enrolled with: it is kept, "
            "and answers only there; `perfit update` trains one for this cloud on the examples"
        )


@contextmanager
def _file(file: Path, *, stdin: bool) -> Iterator[Path]:
    """A path for whoever holds the profile; a temporary file stands for "-", and holds sealed bytes alone."""
    if str(file) != "-":
        yield file.absolute()
        return
    import tempfile  # which brings five more: too much for every start

    with tempfile.TemporaryDirectory(prefix="perfit-") as folder:
        path = Path(folder) / "backup"
        if stdin:
            with path.open("wb") as copy:
                left = _LARGEST_BACKUP
                while part := sys.stdin.buffer.read(min(1 << 20, left + 1)):
                    left -= len(part)
                    if left < 0:
                        raise InvalidInput("stdin holds more than a backup can be")
                    copy.write(part)
        yield path


def _passphrase(session: Session, prompt: str, *, confirm: bool = False) -> str:
    given = session.settings.backup_passphrase()
    return given if given is not None else ask_passphrase(prompt, confirm=confirm)


def migrate(
    context: typer.Context, *, task: TaskOption = None, profile: ProfileOption = None, json: JsonFlag = False
) -> None:
    """Train anew what was trained against an artefact that the cloud has replaced.

    It starts from the new seed, on your whole history, and says what both versions are worth. The old one
    is kept beside the new.

    \b
    perfit migrate
    """
    session = Session.of(context, profile=profile, json=json)
    from perfit_device import process_limits
    from perfit_device.operations.migrate import Migrate

    process_limits.limit_process()
    progress = Progress()

    with progress:
        done = session.perform(Migrate(task), progress.step_or_note)
    if session.json:
        session.emit([asdict(each) for each in done])
    for each in done:
        _report_migrated(each)
    if not done:
        say("every shift of yours is for what the cloud serves; there is nothing to migrate")


def _report_migrated(done: Migrated) -> None:
    if done.loss_before is None:
        before = "what the old one was worth was not recorded, and cannot be measured any more"
    else:
        before = f"the old one had a loss of {done.loss_before:.4f} at its own gate"
        if done.same_model is not True:
            why = "the base model changed, so" if done.same_model is False else "maybe of another base model:"
            before += f" ({why} the two may not compare)"
        elif not done.same_reading:
            before += " (read behind another number of your examples, so the two may not compare)"
    after = "" if done.loss_after is None else f"; the new one has {done.loss_after:.4f} at its gate"
    seed = "" if done.loss_seed is None else f", the new seed {done.loss_seed:.4f}"
    better = "" if done.is_better else ": no better than the seed by more than chance, so more examples help"
    kept = "kept beside it" if done.keeps_old else "dropped, since it knew what you forgot"
    say(
        f"{done.artefact}: version {done.after} is your shift now, and version {done.before} {kept}; "
        f"{before}{after}{seed}{better}"
    )


def unenroll(
    context: typer.Context,
    *,
    offline: Annotated[
        bool, typer.Option("--offline", help="Only wipe; the cloud is not told, and still knows the device.")
    ] = False,
    keep_history: Annotated[
        bool, typer.Option("--keep-history", help="Keep the profile with its examples, and nothing else.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    profile: ProfileOption = None,
    json: JsonFlag = False,
) -> None:
    """Leave the cloud, and wipe the profile: the cloud refuses its certificate from then on.

    What was overwritten cannot come back; `perfit backup` first keeps what is yours.

    \b
    perfit unenroll --yes
    perfit unenroll --keep-history --yes
    """
    session = Session.of(context, profile=profile, json=json)
    from perfit_device.agent import launch
    from perfit_device.cli.profiles import finish_removals, wipe_profile
    from perfit_device.operations.unenroll import Unenroll

    name = session.settings.profile
    if name in finish_removals(session.settings) and not session.settings.vault_path.exists():
        return
    if not yes:
        kept = "all but its examples" if keep_history else "everything in it"
        require_yes(f'this leaves the cloud of the profile "{name}" and deletes {kept} for good.')
    done = session.perform(Unenroll(offline, keep_history))
    if keep_history:
        launch.stop(session.settings)
    else:
        wipe_profile(session.settings)
    if session.json:
        session.emit(asdict(done))
    told = (
        "the cloud refuses its certificate"
        if done.is_withdrawn
        else "the cloud does not know yet that it left"
    )
    rest = f"{done.examples} examples are left" if keep_history else "nothing of it is left here"
    say(f'unenrolled "{name}": {told}, and {rest}')
