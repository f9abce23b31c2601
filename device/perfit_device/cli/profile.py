"""`perfit status`, `profiles`, `export`, `undo` and `passphrase`: the profile itself."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from perfit_device.cli.common import (
    JsonFlag,
    ProfileOption,
    Session,
    TaskOption,
    listed,
    read_enrolment,
    recall,
    say,
)
from perfit_device.cli.prompts import ask_passphrase
from perfit_shared.errors import CertificateSuperseded, ConfigError, NotFound, PerfitError, exit_code
from perfit_shared.terminal import clean, one_line

if TYPE_CHECKING:
    from perfit_device.vault.store import Vault


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
    from perfit_device import personal

    with session.open_vault() as vault:
        cloud_id, name = _trained(vault, task)
        metadata = personal.export(vault, cloud_id, name, shift, force=force)
    if session.json:
        session.emit({"task": name, "version": metadata.get("version"), "file": str(shift)})
    say(f"wrote {shift}; it is not sealed, so keep it where you would keep a diary")


def undo(
    context: typer.Context,
    *,
    task: TaskOption = None,
    profile: ProfileOption = None,
    json_: JsonFlag = False,
) -> None:
    """Take back the last update: the version before it is your shift again.

    Once more, and the update is back. An update that is half-done is dropped, since it went on from
    the version that is taken back. The cloud is not asked.
    """
    session = Session.of(context, profile=profile, json=json_)
    from perfit_device import personal
    from perfit_device.training import update as updates

    with session.open_vault() as vault:
        cloud_id, name = _trained(vault, task)
        with vault.transaction():
            count = personal.undo(vault, cloud_id, name)
            place = updates.row_name(cloud_id, name, recall(vault).task_of(name))
            updates.forget_checkpoint(vault, place)
            updates.forget_finished(vault, place)
    if session.json:
        session.emit({"task": name, "updates": count})
    say(f"{name}: your shift is the version of {count} updates; `perfit undo` again brings the other back")


def _trained(vault: Vault, task: str | None) -> tuple[str, str]:
    """(cloud id, artefact) of the shift that is meant. Raises NotFound."""
    from perfit_device import personal

    cloud_id = recall(vault).cloud_id
    names = personal.artefacts(vault, cloud_id)
    if task is None and len(names) == 1:
        return cloud_id, names[0]
    if task in names:
        return cloud_id, str(task)
    if not names:
        raise NotFound("there is no personal shift yet; `perfit update` trains one")
    if task is None:
        raise NotFound(f"there are several shifts; choose one with --task: {listed(names)}")
    raise NotFound(
        f'there is no personal shift for "{one_line(task)[:64]}"; there is one for {listed(names)}'
    )


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


def status(
    context: typer.Context,
    *,
    profile: ProfileOption = None,
    json_: JsonFlag = False,
) -> None:
    """Show the profile: its cloud, certificate, tasks, examples and shifts.

    The exit code is 3 when the cloud cannot be reached, and 4 when it refuses this device.
    """
    session = Session.of(context, profile=profile, json=json_)
    with session.open_vault() as vault:
        trouble = _trouble(session, vault)
        report = _status(session, vault) | {
            "cloud": "reachable" if trouble is None else str(trouble),
            "renewed_elsewhere": isinstance(trouble, CertificateSuperseded),
        }
    if session.json:
        session.emit(report)
    else:
        _print_status(report)
    if trouble is not None:
        raise typer.Exit(exit_code(trouble))


def _print_status(report: dict[str, Any]) -> None:
    print(f"profile      {report['profile']}\nvault        {report['vault']}")
    print(f"cloud        {report['address'] or 'not enrolled'}, {report['cloud']}")
    if report["certificate_until"]:
        print(f"identity     {clean(report['identity'])}, certified until {report['certificate_until']}")
    for name, task in report["tasks"].items():
        parts = [f"{task['examples']} examples"]
        parts.append(
            f"personal shift of {task['updates']} updates" if task["updates"] else "no personal shift"
        )
        if task["half_done"]:
            parts.append(f"an update waits at step {task['half_done']}; `perfit update` resumes it")
        print(f"{name}: {', '.join(parts)}")


def _trouble(session: Session, vault: Vault) -> PerfitError | None:
    """Why the cloud does not serve this device; None when it does."""
    from perfit_device.cloud.retry import NO_RETRIES

    try:
        with session.open_cloud(vault, NO_RETRIES):
            return None
    except PerfitError as error:
        return error


def _status(session: Session, vault: Vault) -> dict[str, Any]:
    from perfit_device import history, personal
    from perfit_device.cloud.identity import certificate_life, identity_in
    from perfit_device.training import update as updates

    enrolment = read_enrolment(vault)
    known = recall(vault)
    cloud_id = known.cloud_id
    items = history.load(vault)
    tasks: dict[str, Any] = {}
    by_task = {name: known.task_of(name) for name in known.tasks}
    # Examples of tasks that the cloud does not serve are the user's all the same.
    by_task |= {item.task: item.task for item in items if item.task not in by_task.values()}
    for name, task in sorted(by_task.items()):
        summary = personal.summary(vault, cloud_id, name)
        kept = updates.read_checkpoint(vault, updates.row_name(cloud_id, name, task))
        tasks[name] = {
            "examples": sum(item.task == task for item in items),
            "updates": int((summary or {}).get("updates", "0")),
            "version": (summary or {}).get("version"),
            "half_done": kept.step if kept is not None else None,
            "can_undo": personal.has_previous(vault, cloud_id, name),
        }
    until = certificate_life(enrolment.certificate)[1] if enrolment else None
    return {
        "profile": session.settings.profile,
        "vault": str(session.settings.vault_path),
        "address": enrolment.address if enrolment else None,
        "cloud_id": enrolment.cloud_id if enrolment else None,
        "identity": identity_in(enrolment.certificate) if enrolment else None,
        "certificate_until": f"{until:%Y-%m-%dT%H:%M:%SZ}" if until else None,
        "tasks": tasks,
    }


def passphrase(context: typer.Context, profile: ProfileOption = None) -> None:
    """Change the vault's passphrase; one key is rewrapped, nothing is re-encrypted.

    PERFIT_PASSPHRASE is the old one, PERFIT_NEW_PASSPHRASE the new one; both are asked for
    on a terminal when not set.
    """
    session = Session.of(context, profile=profile)
    with session.open_vault() as vault:
        new = session.settings.new_passphrase() or ask_passphrase("New passphrase", confirm=True)
        if new == session.settings.passphrase():
            raise ConfigError("the new passphrase is the old one; choose another")
        vault.change_passphrase(new)
    say("the passphrase is changed")
