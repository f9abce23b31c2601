"""What the report's tables are made of: cells, rows and panels from groups of runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from perfit_cloud.lamp.figures import UNITS, Heat, Points
from perfit_cloud.lamp.groups import Cell, RunGroup, nearest
from perfit_cloud.lamp.paper import REMARKS, PaperTable

__all__ = [
    "ABLATIONS",
    "NONE",
    "TESTED",
    "Block",
    "Section",
    "around",
    "caption",
    "cell_of",
    "cited",
    "columns_of",
    "not_at_hand",
    "percent",
    "section",
    "setting",
    "tested",
    "text",
    "tick",
    "title",
    "variant",
    "variants",
]

NONE = "–"


@dataclass(frozen=True)
class Block:
    """A table, and the figure below it."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    points: Sequence[Sequence[Points]] = ()
    heat: Sequence[Heat] = ()


@dataclass(frozen=True)
class Section:
    key: str  # of its PNGs' names
    title: str
    about: str
    blocks: Sequence[Block]
    paper: str  # where the paper's figures come from, or that they are not at hand


def setting(group: RunGroup, *, but: str = "") -> str:
    """Layers, ranks, positions, prompts and schedule; `but`: "layers" or "ranks", which a table varies."""
    layers = ";".join(map(str, group.layers))
    told = {"layers": f"layers {layers}", "ranks": f"ranks {group.ranks[0]}/{group.ranks[1]}"}
    varied = [text for name, text in told.items() if name != but]
    asked = f"{group.get('prompts')} prompts, {group.get('schedule')} schedule"
    return ", ".join([*varied, group.get("positions", ""), asked])


def variant(group: RunGroup) -> str:
    """What sets a group apart from the whole method."""
    told = [ABLATIONS[group.get("ablation", "full")]]
    if group.get("collective_users") is not None:
        told.append(f"{group.get('collective_users')} collective users")
    if group.foreign:
        told.append(f"collective shift of {group.get('artefact_task')}")
    elif group.get("artefact_prompts") != group.get("prompts"):
        told.append(f"collective shift trained with {group.get('artefact_prompts')} prompts")
    if group.get("histories", "own") != "own":
        told.append("another user's history")
    return ", ".join(told)


ABLATIONS = {
    "stage1": "stage 1 only",
    "stage2": "stage 2 only (P)",
    "stage2_sum": "stage 2 only (C+P)",
    "full": "full",
}


def cell_of(group: RunGroup | None, measure: str, mode: str) -> Cell | None:
    return None if group is None else group.cell(measure, mode)


def text(cell: Cell | float | None) -> str:
    if isinstance(cell, float):
        return f"{cell:.3f}"
    return NONE if cell is None else str(cell)


def percent(value: float | None) -> str:
    return NONE if value is None else f"{value:.4f}"


def cited(table: PaperTable) -> str:
    return f"The paper's figures: {table.what} ({table.source})."


def not_at_hand(key: str) -> str:
    remark = REMARKS.get(key)
    told = f" In words: {remark[0]} ({remark[1]})." if remark else ""
    return f"The paper's figures for this table are not at hand.{told}"


TESTED = ("measure", "difference", "95 % interval", "p", "users better")


def tested(nest: Mapping[str, Any], group: RunGroup) -> list[list[str]]:
    """Rows of TESTED for loss and the task's first metric, from a nest of `Paired` as JSON."""
    metric = group.measures[1]
    rows = []
    for measure, found in (("loss", nest["loss"]), (metric, nest["mean_over_users"][metric])):
        bounds, difference = found["interval"], found["difference"]
        rows.append(
            [
                measure,
                NONE if difference is None else f"{difference:+.3f}",
                NONE if bounds is None else f"[{bounds[0]:+.3f}, {bounds[1]:+.3f}]",
                NONE if found["p"] is None else f"{found['p']:.4f}",
                f"{found['better']} of {found['of']}",
            ]
        )
    return rows


def section(key: str, title: str, about: str, blocks: Sequence[Block], paper: str) -> Section | None:
    """None when no run has anything for it."""
    filled = [block for block in blocks if block.rows]
    return Section(key, title, about, filled, paper) if filled else None


def title(group: RunGroup) -> str:
    """Of a panel."""
    return tick(f"{group.task.name}\n{setting(group)}", group)


def tick(name: str, group: RunGroup) -> str:
    """With the number of seeds, since error bars then mean something else."""
    return f"{name}\n({len(group.seeds)} seeds)" if len(group.seeds) > 1 else name


def caption(group: RunGroup, *, but: str = "") -> str:
    told = setting(group, but=but)
    return f"{group.task.name}, {group.get('model', '')}, {told}, {group.get('users', '')} users"


def columns_of(group: RunGroup) -> list[tuple[str, str]]:
    """(measure, mode) of a table of variants."""
    return [(m, mode) for m in group.measures for mode in ("collective", "personal") if mode in group.modes]


def around(
    special: Sequence[RunGroup],
    groups: Sequence[RunGroup],
    what: str,
    label: Callable[[RunGroup], tuple[float, str]],
    *,
    joined: int = 0,
) -> list[Block]:
    """A block for each plain group that special ones belong to, with it among them; sorted by label."""
    found: dict[int, list[RunGroup]] = {}
    for group in special:
        reference = nearest(group, groups)
        members = found.setdefault(id(reference), [reference] if reference else [])
        members.append(group)
    return [
        variants(what, [(label(g)[1], g) for g in sorted(members, key=label)], joined=joined)
        for members in found.values()
    ]


def variants(what: str, rows: Sequence[tuple[str, RunGroup]], *, joined: int = 0, but: str = "") -> Block:
    """A table with a row for each variant, and a panel for each measure; `joined` as in Points."""
    first = rows[0][1]
    columns = columns_of(first)
    modes = list(dict.fromkeys(mode for _, mode in columns))
    panels = [
        Points(
            first.task.name,
            what,
            UNITS[measure],
            [tick(*row) for row in rows],
            {mode: [group.cell(measure, mode) for _, group in rows] for mode in modes},
            joined,
        )
        for measure in first.measures
    ]
    return Block(
        [what, *(f"{measure}, {mode}" for measure, mode in columns)],
        [[name, *(text(group.cell(*column)) for column in columns)] for name, group in rows],
        caption(first, but=but),
        points=[panels],
    )
