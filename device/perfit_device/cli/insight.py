"""`perfit insight`: what your shift learned."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from perfit_device.cli.common import JsonFlag, ProfileOption, Session, TaskOption, say
from perfit_device.cli.glance import line_width
from perfit_device.cli.progress import Progress
from perfit_shared.errors import InvalidInput
from perfit_shared.terminal import one_line

if TYPE_CHECKING:
    from perfit_device.insight.report import Insight
    from perfit_device.operations.operation import Event

_BAR = 24  # columns
_SHOWN = 5  # examples


def insight(
    context: typer.Context,
    *,
    task: TaskOption = None,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write one page for a browser.")
    ] = None,
    online: Annotated[
        bool,
        typer.Option("--online", help="Ask the cloud: score what trained, answer some of the test part."),
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace FILE if it exists.")] = False,
    profile: ProfileOption = None,
    json_: JsonFlag = False,
) -> None:
    """Show what your shift learned: losses, distance from the seed, and the examples that it learned most of.

    The page needs nothing beside itself, loads nothing, and holds texts of your own. Without --online the
    cloud is not asked, and the examples are those of the last time.

    \b
    perfit insight
    perfit insight --online --html insight.html
    """
    session = Session.of(context, profile=profile, json=json_)
    if html is not None and not force and os.path.lexists(html):
        raise InvalidInput(f"{html} exists; choose another name, or --force to replace it")
    from perfit_device.operations.insight import ShowInsight
    from perfit_device.operations.operation import Progress as Step

    progress = Progress()

    def happened(event: Event) -> None:
        if isinstance(event, Step):
            progress.count("scores and answers", event.done, event.total)
        else:
            progress.note(event)

    with progress:
        found = session.perform(ShowInsight(task, online), happened)
    if html is not None:
        _write(html, found)
        say(f"wrote {html}; it holds texts of your own, so keep it where you would keep a diary")
    if session.json:
        session.emit(asdict(found))
    elif html is None:
        _print(found)


def _write(path: Path, found: Insight) -> None:
    from perfit_device.insight.page import render
    from perfit_shared.files import write_whole

    try:
        write_whole(path, render(found).encode(), mode=0o600)
    except OSError as error:
        raise InvalidInput(f"cannot write {path}: {error.strerror}") from error


def _print(found: Insight) -> None:
    print(f"{one_line(found.artefact)}, version {found.version}; losses in nats a token")
    if found.updates:
        print("\nupdates       training           gate")
    for each in found.updates:
        outcome = "" if each.accepted else "  kept out"
        print(
            f"{each.date[:10]:<12}  {each.train_before:.3f} → {each.train_after:.3f}     "
            f"{each.gate_before:.3f} → {each.gate_after:.3f}{outcome}"
        )
    if found.measured:
        print(f"\nloss on {found.measured.examples} test examples")
        _bars([(name, loss) for name, loss in found.measured.loss.items()])
    if found.layers:
        print("\ndistance from the seed, by layer")
        _bars([(str(each.number), each.moved) for each in found.layers])
    if found.examples:
        print(f"\nlearned most of, by how far the loss fell ({found.examples_date[:10]})")
    for learned in found.examples[:_SHOWN]:
        _line(f"{learned.before:6.2f} → {learned.after:<5.2f}  ", learned.answer)
    for answer in found.answers:
        print()
        _line("you       ", answer.mine)
        _line("base      ", answer.base)
        _line("personal  ", answer.personal)
    if not found.examples:
        print("\n--online also shows which examples it learned most of, and base beside personal answers")


def _line(label: str, text: str) -> None:
    """As much of the text as the terminal has room for."""
    text, room = one_line(text), line_width() - len(label)
    print(label + (text if len(text) <= room else text[: room - 1] + "…"))


def _bars(values: list[tuple[str, float]]) -> None:
    most = max(value for _, value in values) or 1.0
    for name, value in values:
        print(f"{name:<12}{'█' * max(1, round(_BAR * value / most)):<{_BAR}}  {value:.3f}")
