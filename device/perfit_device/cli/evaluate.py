"""`perfit evaluate`: what your shift is worth, on examples that it has never seen."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from perfit_device.cli.common import JsonFlag, ProfileOption, Session, TaskOption, say
from perfit_device.cli.progress import Progress
from perfit_shared.terminal import one_line

if TYPE_CHECKING:
    from perfit_device.operations.evaluate import Report
    from perfit_device.operations.operation import Event


def evaluate(
    context: typer.Context,
    *,
    task: TaskOption = None,
    shift: Annotated[
        Path | None, typer.Option("--shift", metavar="FILE", help="Also someone else's exported shift.")
    ] = None,
    with_seed: Annotated[
        bool, typer.Option("--with-seed", help="Also the seed, where every shift starts.")
    ] = False,
    answers: Annotated[
        bool, typer.Option("--answers", help="Also print the answers, beside the golds.")
    ] = False,
    profile: ProfileOption = None,
    json: JsonFlag = False,
) -> None:
    """Loss (nats a token) and the task's metric on the test part of your history.

    Ctrl-C and errors end it with what is measured by then. Examples that are too long for the cloud,
    or lack fields of the task, are left out and counted.

    \b
    perfit evaluate --task news_headline
    perfit evaluate --task news_headline --shift friend.shift --json
    """
    session = Session.of(context, profile=profile, json=json)
    from perfit_device import shift_files
    from perfit_device.operations.evaluate import Evaluate, Measured, Stopped

    operation = Evaluate(
        task=task,
        with_seed=with_seed,
        shift=None if shift is None else shift_files.read_bytes(shift),
        shift_name=str(shift or ""),
    )
    progress = Progress()

    def happened(event: Event) -> None:
        if isinstance(event, Measured):
            progress.count(event.name, event.done, event.total)
        elif isinstance(event, Stopped):
            if event.measured:
                progress.say(f"stopped; {', '.join(event.measured)} of {', '.join(event.of)} are measured")
            else:
                progress.say("stopped, before anything was measured")
            if event.report is not None:
                _show(session, event.report, answers=answers, partial=True)
        else:
            progress.note(event)

    with progress:
        report = session.perform(operation, happened)
    _show(session, report, answers=answers, partial=False)


def _show(session: Session, report: Report, *, answers: bool, partial: bool) -> None:
    if report.skipped:
        say(f"{report.skipped} examples are too long for this cloud and were left out")
    if session.json:
        value: dict[str, Any] = {
            "task": report.task,
            "examples": report.examples,
            "skipped": report.skipped + report.left_out,
            "loss": report.loss,
            "metric": {"name": report.metric_name, **report.metric},
        }
        value |= {"answers": report.answers} if answers else {}
        session.emit(value | ({"partial": True} if partial else {}))
        return
    print(f"{report.task}, {report.examples} examples\n{'':<12}{'loss':>8}{report.metric_name:>12}")
    for name, nats in report.loss.items():
        print(f"{name:<12}{nats:>8.4f}{report.metric[name]:>12.4f}")
    for row in report.answers if answers else []:
        print("\n" + "\n".join(f"{name:<12}{one_line(text)}" for name, text in row.items()))
