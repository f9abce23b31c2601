"""What the report's tables are made of: rows and panels from groups of runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from perfit_cloud.lamp.figures import HeatMap, PointPlot
from perfit_cloud.lamp.groups import Cell, RunGroup, nearest
from perfit_cloud.lamp.paper import PaperTable

__all__ = [
    "ABLATIONS",
    "TESTED",
    "Block",
    "Section",
    "beside",
    "caption",
    "columns_of",
    "panels",
    "setting",
    "tested",
    "tick",
    "variant",
    "variants",
    "with_full_method",
]


@dataclass(frozen=True)
class Block:
    """A table, and the figure below it."""

    head: Sequence[str]
    rows: Sequence[Sequence[object]]  # cells as `text_tables` writes them
    caption: str = ""
    points: Sequence[Sequence[PointPlot]] = ()
    heat: Sequence[HeatMap] = ()


@dataclass(frozen=True)
class Section:
    key: str  # of its PNGs' names
    title: str
    about: str
    blocks: Sequence[Block]  # without a row where no run has anything for it
    paper: str  # where the paper's figures come from


ABLATIONS = {
    "stage1": "stage 1 only",
    "stage2": "stage 2 only (P)",
    "stage2_sum": "stage 2 only (C+P)",
    "full": "full",
}
TESTED = ("measure", "difference", "95 % interval", "p", "users better")


# -- a group in words ------------------------------------------------------------------------------


def setting(group: RunGroup, *, but: str = "") -> str:
    """Layers, ranks, positions, prompts and schedule; `but`: "layers" or "ranks", which a table varies."""
    turns = " as chat turns" if group.get("chat") else ""
    words = {
        "layers": f"layers {';'.join(map(str, group.layers))}" if group.layers else "",
        "ranks": f"ranks {group.ranks[0]}/{group.ranks[1]}" if any(group.ranks) else "",
        "positions": group.get("positions", ""),
        "collective": f"{group.whole} collective users" if group.plain and group.whole else "",
        "asked": f"{group.get('prompts')} prompts{turns}",
        "schedule": f"{group.get('schedule')} schedule" if group.get("schedule") else "",
    }
    return ", ".join(text for name, text in words.items() if text and name != but)


def variant(group: RunGroup) -> str:
    """What sets a group apart from the whole method."""
    words = [ABLATIONS.get(group.ablation, group.method)]
    if group.get("k") is not None:
        words.append(f"{group.get('k')} own examples")
    if group.collective_users is not None and not group.plain:
        words.append(f"{group.collective_users} collective users")
    if group.get("communities"):
        words.append(f"starts of {group.get('communities')} communities")
    if group.get("examples") is not None:
        words.append(f"latest {group.get('examples')} examples of each history")
    if group.get("collective_group") is not None:
        words.append(f"group {group.get('collective_group')} of collective users")
    if group.foreign:
        words.append(f"collective shift of {group.get('artefact_task')}")
    elif group.get("artefact_prompts") != group.get("prompts"):
        words.append(f"collective shift trained with {group.get('artefact_prompts')} prompts")
    if group.get("histories", "own") != "own":
        words.append("another user's history")
    return ", ".join(words)


def tick(name: str, group: RunGroup) -> str:
    """With the number of seeds, since error bars then mean something else."""
    return f"{name}\n({len(group.seeds)} seeds)" if len(group.seeds) > 1 else name


def caption(group: RunGroup, *, but: str = "") -> str:
    words = setting(group, but=but)
    return f"{group.task.name}, {group.get('model', '')}, {words}, {group.get('users', '')} users"


# -- rows and panels -------------------------------------------------------------------------------


def tested(nest: Mapping[str, Any], group: RunGroup) -> list[list[str | None]]:
    """Rows of TESTED for loss and the task's first metric, from a nest of `Paired` as JSON."""
    metric = group.measures[1]
    rows: list[list[str | None]] = []
    for measure, found in (("loss", nest["loss"]), (metric, nest["mean_over_users"][metric])):
        bounds, difference, p = found["interval"], found["difference"], found["p"]
        words = None if difference is None else f"{difference:+.3f}"
        interval = None if bounds is None else f"[{bounds[0]:+.3f}, {bounds[1]:+.3f}]"
        better = f"{found['better']} of {found['of']}"
        rows.append([measure, words, interval, None if p is None else f"{p:.4f}", better])
    return rows


def panels(
    title: str, x_label: str, ticks: Sequence[str], cells: Mapping[str, Sequence[Cell | None]]
) -> list[PointPlot]:
    """A panel for each measure of `cells`, with a point at each tick."""
    return [PointPlot(title, x_label, measure, ticks, {measure: row}) for measure, row in cells.items()]


def columns_of(*groups: RunGroup) -> dict[str, tuple[str, str]]:
    """(measure, mode) of a table of variants, by the column's name."""
    shown = [mode for mode in ("collective", "personal") if any(mode in group.modes for group in groups)]
    return {f"{measure}, {mode}": (measure, mode) for measure in groups[0].measures for mode in shown}


def variants(what: str, rows: Sequence[tuple[str, RunGroup]], *, joined: int = 0, but: str = "") -> Block:
    """A table with a row for each variant, and a panel for each measure; `joined` as in PointPlot."""
    first = rows[0][1]
    columns = columns_of(*(group for _, group in rows))
    modes = dict.fromkeys(mode for _, mode in columns.values())
    ticks = [tick(name, group) for name, group in rows]

    def series(measure: str) -> dict[str, list[Cell | None]]:
        return {mode: [group.cell(measure, mode) for _, group in rows] for mode in modes}

    return Block(
        [what, *columns],
        [[name, *(group.cell(*column) for column in columns.values())] for name, group in rows],
        caption(first, but=but),
        points=[[PointPlot(first.task.name, what, m, ticks, series(m), joined) for m in first.measures]],
    )


def beside(blocks: Sequence[Block], groups: Sequence[RunGroup], table: PaperTable, what: str) -> list[Block]:
    """Our blocks, then the paper's rows for each task of `groups` that the table has; none without ours."""
    if not any(block.rows for block in blocks):
        return list(blocks)
    theirs = []
    for task in dict.fromkeys(group.task.name for group in groups):
        measures = list(table.figures.get(task, {}))
        rows = [[row, *(_plain(table.get(task, m, row)) for m in measures)] for row in table.rows(task)]
        theirs.append(Block([what, *measures], rows, f"The paper's {task}, {table.tables}"))
    return [*blocks, *theirs]


def _plain(figure: float | None) -> str | None:
    """As the paper prints it, small ones in powers of ten."""
    if figure is None:
        return None
    return f"{figure:.1e}" if 0 < figure < 1e-2 else f"{figure:.3f}"


def with_full_method(
    special: Sequence[RunGroup],
    groups: Sequence[RunGroup],
    what: str,
    label: Callable[[RunGroup], tuple[float, str]],
) -> list[Block]:
    """A block for each PerFit group that special ones belong to, with it among them; sorted by label."""
    found: dict[int, list[RunGroup]] = {}
    for group in special:
        reference = nearest(group, groups)
        found.setdefault(id(reference), [reference] if reference else []).append(group)
    return [
        variants(what, [(label(g)[1], g) for g in sorted(members, key=label)]) for members in found.values()
    ]
