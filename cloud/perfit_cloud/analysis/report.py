"""report.html: one page that holds its pictures, runs no script and loads nothing."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from perfit_cloud.analysis import paper
from perfit_cloud.analysis.cross_term import CrossTerm
from perfit_cloud.analysis.outliers import Placed
from perfit_cloud.analysis.recommend import Recommendation
from perfit_cloud.analysis.spectrum import SHARES, BlockStatistics

__all__ = ["TaskReport", "write_html"]

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
body { color: #222; }
img { max-width: 100%; height: auto; } figure { margin: 1rem 0; }
figcaption { color: #555; font-size: .9rem; }
table { border-collapse: collapse; margin: 1rem 0; display: block; overflow-x: auto; }
th, td { border-bottom: 1px solid #ccc; padding: .25rem .6rem; text-align: right; vertical-align: top; }
th:first-child, td:first-child, td.text { text-align: left; }
td.text { white-space: pre-wrap; font-size: .85rem; }
.recommended { border-left: 4px solid #2a7; padding: .2rem 1rem; background: #f2faf6; }
"""
_HOW = (
    "A δ-vector is the mean, over one user's queries, of a block's output at the last token with retrieved "
    "entries of the user's own history before the query, minus that of the query alone. Ranks are of the "
    "matrix of all users' vectors as it is (uncentred), so the direction that users share is the first; "
    "ranks with the mean taken out stand beside them. “Share” is of the squared singular values."
)


@dataclass(frozen=True)
class TaskReport:
    """One data folder's results, as the page shows them."""

    name: str
    facts: Mapping[str, Any]  # what was measured on what, shown as it is
    block: int  # the one that is drawn
    blocks: Sequence[BlockStatistics]
    recommendation: Recommendation
    placed: Sequence[Placed]
    texts: Mapping[int, tuple[str, str]] | None  # (id, text) by number; None: left out
    cross_terms: Sequence[CrossTerm]
    pictures: Mapping[str, str] = field(default_factory=dict)  # file name: caption


def write_html(folder: Path, title: str, tasks: Sequence[TaskReport], shared: Mapping[str, str]) -> Path:
    """`shared`: pictures of all tasks together, file name: caption. Pictures lie in `folder`."""
    parts = [f"<h1>{escape(title)}</h1>", _paragraph(_HOW)]
    for task in tasks:
        parts += _task(folder, task)
    if shared:
        parts += ["<h2>All tasks</h2>", *(_picture(folder / name, text) for name, text in shared.items())]
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )
    path = folder / "report.html"
    path.write_text(page, "utf-8")
    return path


def _task(folder: Path, task: TaskReport) -> list[str]:
    facts = "; ".join(f"{name.replace('_', ' ')} {value}" for name, value in task.facts.items())
    drawn = next(b for b in task.blocks if b.block == task.block)
    rows = [
        [
            share,
            drawn.ranks[str(share)],
            drawn.centred_ranks[str(share)],
            *(r[at] for r in paper.RANKS.values()),
        ]
        for at, share in enumerate(SHARES)
    ]
    best = task.recommendation
    return [
        f"<h2>{escape(task.name)}</h2>",
        _paragraph(facts + "."),
        f"<h3>Ranks at block {task.block}</h3>",
        _table(["share", "here", "here, mean out", *(f"paper, {name}" for name in paper.RANKS)], rows),
        _paragraph(paper.REMARK),
        *(_picture(folder / name, caption) for name, caption in task.pictures.items()),
        "<h3>Every block</h3>",
        _blocks(task.blocks),
        *_cross_terms(task.cross_terms),
        *_people(task),
        "<h3>Where to begin</h3>",
        f'<div class="recommended"><p><b>--layers "{";".join(map(str, best.layers))}" '
        f"--collective-rank {best.collective_rank} --personal-rank {best.personal_rank} "
        f"--positions {best.positions}</b></p>{_paragraph(best.reason)}</div>",
    ]


def _blocks(blocks: Sequence[BlockStatistics]) -> str:
    ranks = [f"r at {share}" for share in SHARES]
    head = ["block", *ranks, "first coordinate", "deviation", "shared", "length of δ", "of random prefixes"]
    rows = [
        [b.block, *b.ranks.values(), abs(b.first_mean), b.first_deviation, b.shared, b.norm, b.control_norm]
        for b in blocks
    ]
    note = (
        "Shared: squared length of users' mean over the mean of their squared lengths, 1 where all are one."
    )
    return _table(head, rows) + _paragraph(note)


def _cross_terms(terms: Sequence[CrossTerm]) -> list[str]:
    if not terms:
        return []
    rows = [[t.block, t.users, t.rows, t.median, t.low, t.high] for t in terms]
    return [
        "<h3>Proposition 3's cross term</h3>",
        _paragraph(
            "‖v₂(x + v₁(x)) − v₂(x)‖ / ‖v₁(x)‖ of trained shifts at real hidden states: 0 where the "
            "collective and the personal shift simply add up."
        ),
        _table(["block", "users", "rows", "median", "5 %", "95 %"], rows),
    ]


def _people(task: TaskReport) -> list[str]:
    head = ["", "user", "distance"] + ([] if task.texts is None else ["retrieved for the first query"])
    rows: list[list[object]] = []
    for one in task.placed:
        known = None if task.texts is None else task.texts.get(one.number)
        name = f"number {one.number}" if known is None else known[0]
        rows.append([one.where, name, one.distance, *([] if known is None else [known[1]])])
    return [
        "<h3>Closest to the collective vector, in the middle, and farthest</h3>",
        _table(head, rows, text=3),
        *(
            [_paragraph("Texts and ids were left out; a number is the user's place in the file.")]
            * (task.texts is None)
        ),
    ]


def _paragraph(text: str) -> str:
    return f"<p>{escape(text)}</p>"


def _picture(path: Path, caption: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return (
        f'<figure><img alt="{escape(caption)}" src="data:image/png;base64,{data}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[object]], *, text: int | None = None) -> str:
    """Column `text` holds words."""
    lines = ["<tr>" + "".join(f"<th>{escape(cell)}</th>" for cell in head) + "</tr>"]
    for row in rows:
        cells = (
            f"<td{' class=text' if at == text else ''}>{escape(_cell(value))}</td>"
            for at, value in enumerate(row)
        )
        lines.append("<tr>" + "".join(cells) + "</tr>")
    return "<table>" + "".join(lines) + "</table>"


def _cell(value: object) -> str:
    if value is None:
        return "–"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
