"""What `perfit status` prints: one screen, in lines that fit a narrow terminal."""

from __future__ import annotations

import shutil
import textwrap
from typing import TYPE_CHECKING

from perfit_shared.terminal import one_line

if TYPE_CHECKING:
    from perfit_device.operations.status import Status, TaskStatus
    from perfit_device.starts import Choice

__all__ = ["line_width", "print_status"]

_LABEL = 9  # columns
_WIDEST, _NARROWEST = 80, 32


def print_status(found: Status) -> None:
    _line("profile", found.profile)
    _line("vault", found.vault)
    _line("cloud", f"{found.address or 'not enrolled'}, {found.cloud}")
    if found.certificate_until:
        until = found.certificate_until.replace("T", " ").removesuffix(":00Z").removesuffix("Z")
        _line("identity", f"{found.identity or ''}, certified until {until} UTC")
    used = {name: task for name, task in found.tasks.items() if task.examples or task.updates}
    if unused := [one_line(name) for name in found.tasks if name not in used]:
        _line("unused", f"{', '.join(unused)}: nothing of yours")
    for name, task in used.items():
        print(f"\n{one_line(name)}")
        for label, text in _task_lines(task):
            _line(label, text)


def _task_lines(task: TaskStatus) -> list[tuple[str, str]]:
    lines = [("history", _history(task))]
    if task.updates:
        kept = f", {len(task.versions)} kept" if len(task.versions) > 1 else ""
        lines.append(("shift", f"version {task.current}, of {task.updates} updates{kept}"))
    else:
        lines.append(("shift", "none yet; `perfit update` trains one"))
    if task.start is not None:
        lines.append(("start", _start(task.start)))
    lines.append(("best", _best(task)))
    if task.half_done:
        lines.append(("half-done", f"an update waits at step {task.half_done}; `perfit update` resumes it"))
    lines.append(("update", "due" if task.due else f"not due: {task.not_due}"))
    return lines


def _start(start: Choice) -> str:
    """Where the shift begins, or an answer while there is none."""
    among = f"by your latest {start.examples} examples: loss {start.loss:.2f}"
    if not start.number:
        return f"the plain seed, {among}, no better with any of {start.of} communities"
    return f"community {start.number} of {start.of}, {among}, with the plain seed {start.seed_loss:.2f}"


def _history(task: TaskStatus) -> str:
    split = task.split
    parts = f": {split['train']} train, {split['gate']} gate, {split['test']} test" if split else ""
    return f"{task.examples} examples{parts}" + (f"; {task.new} new" if task.new else "")


def _best(task: TaskStatus) -> str:
    """Which way is better, and how anybody knows."""
    if task.best is None:
        return "not known; `perfit evaluate` measures it"
    measured, version = task.measured, task.current if task.updates else None
    if measured is not None and measured.version == version:
        losses = ", ".join(f"{name} {loss:.2f}" for name, loss in measured.loss.items())
        return f"{task.best}, by evaluate on {measured.examples}: {losses}"
    learned = task.versions[[each.number for each in task.versions].index(task.current or 0)].learned
    return f"{task.best}, by the gate: {learned.gate_before or 0:.2f} → {learned.gate_after or 0:.2f}"


def _line(label: str, text: str) -> None:
    first, indent = f"{label:<{_LABEL}}  ", " " * (_LABEL + 2)
    print(textwrap.fill(one_line(text), line_width(), initial_indent=first, subsequent_indent=indent))


def line_width() -> int:
    """Columns of the terminal, as many as are easy to read."""
    return max(_NARROWEST, min(_WIDEST, shutil.get_terminal_size().columns))
