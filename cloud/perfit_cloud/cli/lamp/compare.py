"""`perfit-cloud lamp compare`: is one run better than another?"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from perfit_cloud.text_tables import aligned_table

if TYPE_CHECKING:
    from perfit_cloud.lamp.statistics import Paired

_HEAD = ("", "A", "B", "A - B", "95 % interval", "p", "A better", "A worse")


def compare(
    a: Annotated[str, typer.Argument(metavar="A", help="Run folder, or DIR:MODE; the mode is personal.")],
    b: Annotated[str, typer.Argument(metavar="B", help="The same; it may be another mode of the same run.")],
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Compare two runs user by user: difference, 95 % interval and a paired test, clustered by user.

    Modes: base, collective, seed, personal, other (someone else's shift). Queries pair by user and query id.

    \b
    perfit-cloud lamp compare runs/full runs/stage2
    perfit-cloud lamp compare runs/full:personal runs/full:collective --json
    """
    from perfit_cloud.lamp.compare import Side
    from perfit_cloud.lamp.compare import compare as compare_sides

    comparison = compare_sides(Side.parse(a), Side.parse(b))
    for line in comparison.warnings():
        typer.echo(f"perfit-cloud: {line}", err=True)
    if as_json:
        typer.echo(json.dumps(comparison.to_json(), ensure_ascii=False))
        return
    typer.echo(
        f"{comparison.a.run.task.name}: A = {comparison.a.name}, B = {comparison.b.name}; "
        f"{comparison.users} users, {comparison.queries} queries"
    )
    against = comparison.against
    rows = [_row("loss (nats a token, mean over users)", against["loss"])]
    rows += [_row(f"{name} (all queries)", paired) for name, paired in against["metrics"].items()]
    rows += [_row(f"{name} (mean over users)", paired) for name, paired in against["mean_over_users"].items()]
    rows += [
        _row(f"{name} (all queries)", paired) for name, paired in against.get("text_metrics", {}).items()
    ]
    typer.echo("\n".join(aligned_table(_HEAD, rows)))


def _row(name: str, paired: Paired) -> list[str]:
    bounds = "-" if paired.interval is None else f"[{paired.interval[0]:.4f}, {paired.interval[1]:.4f}]"
    figures = [f"{paired.a:.4f}", f"{paired.b:.4f}", f"{paired.difference:+.4f}", bounds]
    p = "-" if paired.p is None else f"{paired.p:.4f}"
    return [name, *figures, p, f"{paired.better} of {paired.of}", f"{paired.worse} of {paired.of}"]
