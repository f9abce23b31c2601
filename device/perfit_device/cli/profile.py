"""`perfit status`, `perfit export`, `perfit passphrase`: the profile itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from perfit_device.cli.common import (
    JsonFlag,
    ProfileOption,
    Session,
    TaskOption,
    ask_passphrase,
    clean,
    read_enrolment,
    recall,
    say,
)
from perfit_shared.errors import CertificateSuperseded, ConfigError, NotFound, PerfitError

if TYPE_CHECKING:
    from perfit_device.vault import Vault


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

    \b
    perfit export --shift mine.shift --task news_headline
    """
    session = Session.of(context, profile=profile, json=json_)
    from perfit_device import personal

    with session.open_vault() as vault, session.open_cloud(vault) as (_, info):
        artefact = session.artefact(info, vault, task)
        mine = personal.load(vault, info.cloud_id, artefact)
        if mine is None:
            raise NotFound(f"there is no personal shift for {artefact.name} yet; `perfit update` trains one")
        personal.export(shift, artefact, mine.tensors, force=force)
    if session.json:
        session.emit({"task": artefact.name, "version": artefact.version, "file": str(shift)})
    say(f"wrote {shift}; it is not sealed, so keep it where you would keep a diary")


def status(
    context: typer.Context,
    *,
    profile: ProfileOption = None,
    json_: JsonFlag = False,
) -> None:
    """Show the profile: its cloud, certificate, tasks, examples and shifts."""
    session = Session.of(context, profile=profile, json=json_)
    with session.open_vault() as vault:
        reachable, is_renewed_elsewhere = _cloud_state(session, vault)
        report = _status(session, vault) | {"cloud": reachable, "renewed_elsewhere": is_renewed_elsewhere}
    if session.json:
        session.emit(report)
        return
    print(f"profile      {report['profile']}\nvault        {report['vault']}")
    print(f"cloud        {report['address'] or 'not enrolled'}, {reachable}")
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


def _cloud_state(session: Session, vault: Vault) -> tuple[str, bool]:
    """ "reachable", or why not; and whether that is because somebody else renewed this identity."""
    from perfit_device.patience import IMPATIENT

    try:
        with session.open_cloud(vault, IMPATIENT):
            return "reachable", False
    except PerfitError as error:
        return str(error), isinstance(error, CertificateSuperseded)


def _status(session: Session, vault: Vault) -> dict[str, Any]:
    from perfit_device import history, personal, updates
    from perfit_device.identity import certificate_life, identity_in

    enrolment = read_enrolment(vault)
    cloud_id, known = recall(vault)
    items = history.load(vault)
    tasks: dict[str, Any] = {}
    by_task = {name: str(json.loads(data)["name"]) for name, data in known.items()}
    # Examples of tasks that the cloud does not serve are the user's all the same.
    by_task |= {item.task: item.task for item in items if item.task not in by_task.values()}
    for name, task in sorted(by_task.items()):
        summary = personal.summary(vault, cloud_id, name)
        kept = updates.read_checkpoint(vault, updates.place_of(cloud_id, name, task))
        tasks[name] = {
            "examples": sum(item.task == task for item in items),
            "updates": int((summary or {}).get("updates", "0")),
            "version": (summary or {}).get("version"),
            "half_done": kept.step if kept is not None else None,
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
