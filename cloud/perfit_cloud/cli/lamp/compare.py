"""`perfit-cloud lamp compare`: is one run better than another?"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from perfit_cloud.lamp.compare import Comparison
    from perfit_cloud.lamp.statistics import Paired

_HEAD = ("", "A", "B", "A - B", "95 % interval", "p", "A better", "A worse")


def compare(
    a: Annotated[str, typer.Argument(metavar="A", help="Run folder, or DIR:MODE; the mode is personal.")],
    b: Annotated[str, typer.Argument(metavar="B", help="The same; it may be another mode of the same run.")],
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Compare two runs user by user: difference, 95 % interval and a paired test, clustered by user.

    Modes: base, collective, personal, other (someone else's shift). Queries pair by user and query id.

    \b
    perfit-cloud lamp compare runs/full runs/stage2
    perfit-cloud lamp compare runs/full:personal runs/full:collective --json
    """
    from perfit_cloud.lamp.compare import Side
    from perfit_cloud.lamp.compare import compare as compare_sides

    comparison = compare_sides(Side.parse(a), Side.parse(b))
    for line in _warnings(comparison):
        typer.echo(f"perfit-cloud: {line}", err=True)
    if as_json:
        typer.echo(json.dumps(comparison.to_json(), ensure_ascii=False))
    else:
        typer.echo("\n".join(_table(comparison)))


def _warnings(comparison: Comparison) -> list[str]:
    unpaired = comparison.unpaired
    lines = [
        f"{unpaired[what][side]} {what} only in {name}, left out"
        for side, name in (("a", comparison.a.name), ("b", comparison.b.name))
        for what in ("users", "queries")
        if unpaired[what][side]
    ]
    if not comparison.same_tokens:
        lines.append("the two runs count different tokens, so their losses cannot be compared")
    lines += [
        f"the two runs differ in {name} ({a}; {b}), which their answers follow as well"
        for name, (a, b) in comparison.differing.items()
    ]
    return lines


def _table(comparison: Comparison) -> list[str]:
    rows: list[tuple[str, ...]] = [_HEAD]
    against: Mapping[str, Any] = comparison.against
    rows.append(_row("loss (nats a token, mean over users)", against["loss"]))
    rows += [_row(f"{name} (all queries)", paired) for name, paired in against["metrics"].items()]
    rows += [_row(f"{name} (mean over users)", paired) for name, paired in against["mean_over_users"].items()]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEAD))]
    title = (
        f"{comparison.a.run.task.name}: A = {comparison.a.name}, B = {comparison.b.name}; "
        f"{comparison.users} users, {comparison.queries} queries"
    )
    return [title] + [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


def _row(name: str, paired: Paired) -> tuple[str, ...]:
    bounds = "-" if paired.interval is None else f"[{paired.interval[0]:.4f}, {paired.interval[1]:.4f}]"
    return (
        name,
        f"{paired.a:.4f}",
        f"{paired.b:.4f}",
        f"{paired.difference:+.4f}",
        bounds,
        "-" if paired.p is None else f"{paired.p:.4f}",
        f"{paired.better} of {paired.of}",
        f"{paired.worse} of {paired.of}",
    )
