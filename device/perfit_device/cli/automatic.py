"""`perfit update --auto`: for timers, which call it often."""

from __future__ import annotations

from dataclasses import asdict

from perfit_device import process_limits
from perfit_device.cli.common import Session, say
from perfit_device.cli.progress import Progress


def update_when_due(session: Session, task: str | None) -> None:
    """Decide, train what is due, and say why the rest is not. No decision of it is an error."""
    process_limits.limit_process()
    from perfit_device.operations.automatic import AutomaticUpdate

    progress = Progress()

    with progress:
        decisions = session.perform(AutomaticUpdate(task), progress.step_or_note)
    if session.json:
        session.emit([asdict(decision) for decision in decisions])
    for each in decisions:
        outcome = "accepted" if each.accepted else "kept out, your shift stays as it was"
        say(f"{each.artefact}: " + (f"trained, {outcome}" if each.trained else f"not now: {each.reason}"))
