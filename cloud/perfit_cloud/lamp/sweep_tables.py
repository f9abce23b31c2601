"""The report's sections on what is varied: layers, ranks, collective users, collective shifts, seeds."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace

from perfit_cloud.lamp.compare import Side, compare
from perfit_cloud.lamp.figures import HeatMap, PointPlot
from perfit_cloud.lamp.groups import RunGroup, collective_sizes, families, rank_grids, short_histories, sweeps
from perfit_cloud.lamp.layout import (
    Block,
    Section,
    beside,
    caption,
    columns_of,
    tested,
    variant,
    variants,
    with_full_method,
)
from perfit_cloud.lamp.paper import COLLECTIVE_GROUPS, FEW_USERS, LAYERS, OTHER_TASKS, PICTURES, SEEDS
from perfit_cloud.lamp.summary import as_json
from perfit_shared.presets import spaced_layers

__all__ = ["SWEEP_SECTIONS"]


def _layers(groups: Sequence[RunGroup]) -> Section:
    blocks, drawn = [], []
    for family in sweeps(groups):
        rows = [(";".join(map(str, group.layers)), group) for group in family]
        single = sum(len(group.layers) == 1 for group in family)
        blocks.append(variants("layers", rows, but="layers", joined=single))
        drawn += family
    about = "Blocks counted from 0; all else equal, but for a learning rate that trials chose."
    return Section(
        "layers", "Layers (Table 11)", about, beside(blocks, drawn, LAYERS, "layer of 32"), LAYERS.cited
    )


def _layer_counts(groups: Sequence[RunGroup]) -> Section:
    blocks = []
    for family in families([group for group in groups if group.complete], "layers"):
        spaced = {len(g.layers): g for g in family if g.layers == _spaced(g)}
        if len(spaced) > 1:
            rows = [(f"{count}: {';'.join(map(str, g.layers))}", g) for count, g in sorted(spaced.items())]
            blocks.append(variants("number of layers", rows, but="layers", joined=len(rows)))
    return Section(
        "layer_counts",
        "Number of layers (Fig. 6)",
        "Symmetric about the middle block, the model's blocks over their number apart.",
        blocks,
        PICTURES["layers"],
    )


def _spaced(group: RunGroup) -> tuple[int, ...]:
    blocks = group.get("blocks", 0)
    return spaced_layers(len(group.layers), blocks) if 0 < len(group.layers) <= blocks else ()


def _ranks(groups: Sequence[RunGroup]) -> Section:
    blocks = []
    for family in rank_grids(groups):
        by_rank = {group.ranks: group for group in family}
        collective, personal = (sorted({ranks[axis] for ranks in by_rank}) for axis in (0, 1))
        rows: list[list[object]] = []
        heat = []
        for measure in family[0].measures:
            cells = [
                [by_rank[c, p].cell(measure, "personal") if (c, p) in by_rank else None for p in personal]
                for c in collective
            ]
            rows += [[measure, rank, *row] for rank, row in zip(collective, cells, strict=True)]
            name = f"{family[0].task.name}: {measure}"
            heat.append(
                HeatMap(name, "personal rank", "collective rank", measure, personal, collective, cells)
            )
        head = ["measure", "collective rank", *(f"personal rank {p}" for p in personal)]
        blocks.append(Block(head, rows, caption(family[0], but="ranks"), heat=heat))
    about = "The personal mode; all else equal, but for a learning rate that trials chose."
    return Section("ranks", "Ranks (Fig. 5)", about, blocks, PICTURES["ranks"])


def _collective_users(groups: Sequence[RunGroup]) -> Section:
    def name(group: RunGroup) -> str:
        users = "all" if group.collective_users is None else str(group.collective_users)
        return users if group.complete else f"{users}, {group.method}"

    sizes = collective_sizes(groups)
    blocks = [
        variants(
            "collective users",
            [(name(group), group) for group in family],
            joined=len(family) if all(group.complete for group in family) else 0,
        )
        for family in sizes
    ]
    drawn = [group for family in sizes for group in family]
    return Section(
        "collective_users",
        "Few collective users (Table 14)",
        "Stage 1 saw only so many users; those measured are the same, and all else is equal.",
        beside(blocks, drawn, FEW_USERS, "collective users, method"),
        FEW_USERS.cited,
    )


def _collective_groups(groups: Sequence[RunGroup]) -> Section:
    blocks, drawn = [], []
    special = [group for group in groups if group.get("collective_group") is not None]
    for family in families(special, "collective_group"):
        ordered = sorted(family, key=lambda group: int(group.get("collective_group")))
        block = variants("group", [(str(g.get("collective_group")), g) for g in ordered])
        columns = columns_of(ordered[0]).values()
        values = ([group.cell(*column) for group in ordered] for column in columns)
        spread = [
            None if None in cells else f"{statistics.pvariance([c.value for c in cells if c]):.1e}"
            for cells in values
        ]
        blocks.append(replace(block, rows=[*block.rows, ["variance", *spread]]))
        drawn += ordered
    return Section(
        "collective_groups",
        "Groups of collective users (Table 15)",
        "Stage 1 on disjoint groups of equal size, drawn by the seed; those measured are the same.",
        beside(blocks, drawn, COLLECTIVE_GROUPS, "group"),
        COLLECTIVE_GROUPS.cited,
    )


def _histories(groups: Sequence[RunGroup]) -> Section:
    def whose(group: RunGroup) -> tuple[float, str]:
        own = group.get("histories", "own") == "own"
        return (0, "own history") if own else (1, "another user's history")

    swapped = [group for group in groups if group.get("histories", "own") != "own"]
    return Section(
        "histories",
        "Another user's history",
        "An ablation of ours: each user's φ₂ trained on another user's history, measured on the user's own "
        "queries.",
        with_full_method(swapped, groups, "stage 2 trained on", whose),
        "The paper has no such table.",
    )


def _foreign(groups: Sequence[RunGroup]) -> Section:
    def of_task(group: RunGroup) -> tuple[float, str]:
        return int(group.foreign), str(group.get("artefact_task") or group.task.name)

    foreign = [group for group in groups if group.foreign]
    return Section(
        "artefact_task",
        "Another task's collective shift (Table 16)",
        "Stage 2 on top of another task's φ₁ and seed.",
        beside(
            with_full_method(foreign, groups, "collective shift of", of_task),
            foreign,
            OTHER_TASKS,
            "collective shift of",
        ),
        OTHER_TASKS.cited,
    )


def _short_histories(groups: Sequence[RunGroup]) -> Section:
    blocks = []
    for family in short_histories(groups):
        measures, lengths = family[0].measures, list(dict.fromkeys(_length(group) for group in family))
        by = {(_length(group), _start(group)): group for group in family}
        starts = list(dict.fromkeys(start for _, start in by))
        rows: list[list[object]] = []
        for (length, start), group in by.items():
            plain = by.get((length, _PLAIN))
            tests = _against(group, plain) if plain is not None and start != _PLAIN else [None] * 4
            rows.append([length, start, *(group.cell(m, "personal") for m in measures), *tests])
        series = {
            m: {s: [by[n, s].cell(m, "personal") if (n, s) in by else None for n in lengths] for s in starts}
            for m in measures
        }
        name = family[0].task.name
        points = [PointPlot(name, "examples", m, lengths, series[m], len(lengths)) for m in measures]
        head = ["examples", "start", *measures, "loss − plain seed", "95 % interval", "p", "users better"]
        blocks.append(Block(head, rows, caption(family[0]), points=[points]))
    return Section(
        "cold_start",
        "Cold start",
        "The personal mode, with the latest examples of each history alone: from the plain seed, that of "
        "the community that suits a person's own examples best, or from the plain one with own examples "
        "before the query, after an update, after one behind such examples, or without one. Differences are "
        "of the loss, at the same number of examples, paired by user.",
        blocks,
        "The paper has no such table.",
    )


_PLAIN = "plain seed"


def _length(group: RunGroup) -> str:
    return "all" if group.get("examples") is None else str(group.get("examples"))


def _start(group: RunGroup) -> str:
    count = group.get("communities")
    words = f"seeds of {count} communities" if count else _PLAIN
    words = "seed of 1 community" if count == 1 else words
    words += ", no update" if group.method == "perfit_stage1+rag" else ""
    if group.get("k") is None:
        return words
    behind = ", update behind" if group.method == "perfit_behind+rag" else ","
    return f"{words}{behind} {group.get('k')} own examples in the prompt"


def _against(group: RunGroup, plain: RunGroup) -> list[str | None]:
    if not all("personal" in each.modes for each in (group, plain)):
        return [None] * 4
    found = compare(Side(group.runs[0], "personal"), Side(plain.runs[0], "personal"))
    return tested(as_json(found.against), group)[0][1:]


def _seeds(groups: Sequence[RunGroup]) -> Section:
    blocks = []
    several = [group for group in groups if len(group.seeds) > 1 and columns_of(group)]
    for group in several:
        columns = columns_of(group)
        values = zip(*(group.values(*column) for column in columns.values()), strict=True)
        rows: list[list[object]] = [[seed, *row] for seed, row in zip(group.seeds, values, strict=True)]
        rows.append(["mean ± sd", *(group.cell(*column) for column in columns.values())])
        blocks.append(Block(["seed", *columns], rows, f"{caption(group)}, {variant(group)}"))
    about = "± is one standard deviation over seeds, which set stage 1's start, the batches and all draws."
    return Section("seeds", "Seeds (Table 10)", about, beside(blocks, several, SEEDS, "seeds"), SEEDS.cited)


SWEEP_SECTIONS: Sequence[Callable[[Sequence[RunGroup]], Section]] = (
    _layers,
    _layer_counts,
    _ranks,
    _collective_users,
    _collective_groups,
    _histories,
    _short_histories,
    _foreign,
    _seeds,
)
