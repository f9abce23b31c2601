"""`perfit doctor`: what is wrong, and what mends it."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

import typer

from perfit_device.cli.common import JsonFlag, ProfileOption, Session
from perfit_shared.errors import ConfigError, PerfitError
from perfit_shared.terminal import one_line, paint

if TYPE_CHECKING:
    from perfit_device.operations.doctor import Finding

_COLOURS = {"ok": "green", "note": "yellow", "broken": "red"}


def doctor(context: typer.Context, *, profile: ProfileOption = None, json: JsonFlag = False) -> None:
    """Look for what is broken: clock, home, disk, proxies, vault, certificate, cloud, shifts.

    What needs no passphrase is looked at in any case, before the first enrolment too. Each finding says
    what mends it. The exit code is 1 when something is broken.

    \b
    perfit doctor
    perfit doctor --json
    """
    session = Session.of(context, profile=profile, json=json)
    from perfit_device.operations.doctor import examine_machine

    findings = examine_machine(session.settings)
    if session.settings.vault_path.exists() and all(f.state == "ok" for f in findings if f.name == "profile"):
        findings += _inside(session)
    if session.json:
        session.emit({"findings": [asdict(finding) for finding in findings]})
    else:
        for finding in findings:
            _print(finding)
    if broken := [finding.name for finding in findings if finding.state == "broken"]:
        raise ConfigError(f"broken: {', '.join(broken)}; what mends it stands with each finding")


def _inside(session: Session) -> list[Finding]:
    from perfit_device.operations.doctor import Examine, Finding
    from perfit_shared.errors import Unavailable, VaultBusy, WrongPassphrase

    try:
        return session.perform(Examine(), lambda _: None).findings
    except ConfigError as error:  # nobody there to type a passphrase
        return [Finding("vault", "note", f"locked, so not looked into: {error}", "set PERFIT_PASSPHRASE")]
    except (VaultBusy, Unavailable) as error:
        return [Finding("vault", "note", f"not looked into: {error}", "try again when it is free")]
    except WrongPassphrase as error:
        return [Finding("vault", "broken", str(error), "try again; an old copy has its old one")]
    except PerfitError as error:
        text, _, fix = str(error).partition("; ")
        return [Finding("vault", "broken", text, fix or "restore a copy of the file")]


def _print(finding: Finding) -> None:
    state = paint(f"{finding.state:<7}", _COLOURS[finding.state], sys.stdout)
    print(f"{state} {finding.name:<12} {one_line(finding.text)}")
    if finding.fix:
        print(f"{'':<21}→ {one_line(finding.fix)}")
