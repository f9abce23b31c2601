"""The report's sections: which runs make which of the paper's tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from perfit_cloud.lamp.compare import Side, compare
from perfit_cloud.lamp.figures import HeatMap
from perfit_cloud.lamp.groups import Cell, RunGroup, main_groups, nearest, rank_grids, sweeps
from perfit_cloud.lamp.layout import (
    ABLATIONS,
    TESTED,
    Block,
    Section,
    caption,
    columns_of,
    panels,
    setting,
    tested,
    tick,
    variant,
    variants,
    with_full_method,
)
from perfit_cloud.lamp.paper import ABLATION, MAIN, PARAMETERS, REMARKS, not_at_hand
from perfit_cloud.lamp.results import MODES
from perfit_cloud.lamp.summary import as_json

__all__ = ["SECTIONS"]


def _main(groups: Sequence[RunGroup]) -> Section:
    rows: list[list[object]] = []
    points = []
    for group in main_groups(groups):
        task, users, seeds = group.task.name, group.get("users", ""), len(group.seeds)
        for measure in group.measures:
            ours = [group.cell(measure, mode) for mode in MODES]
            theirs = [MAIN.get(task, measure, column) for column in ("perfit", "oppu")]
            label = [task, group.get("model", ""), setting(group), group.decoding, users, seeds]
            rows.append([*label, measure, *ours, *theirs])
        cells = {m: [group.cell(m, mode) for mode in group.modes] for m in group.measures}
        points.append(panels(tick(f"{task}\n{setting(group)}", group), "shift", group.modes, cells))
    head = ["task", "model", "setting", "decoding", "users", "seeds", "measure", *MODES]
    return Section(
        "main",
        "Main results",
        "base: the untouched model; collective: φ₁ alone; seed: φ₂∘φ₁ as stage 1 left them; personal: the "
        "user's φ₂ after φ₁; other: someone else's φ₂.",
        [Block([*head, "paper: PerFit", "paper: OPPU"], rows, points=points)],
        MAIN.cited,
    )


def _paired(groups: Sequence[RunGroup]) -> Section:
    rows = [
        [group.task.name, setting(group), seed, name.replace("_vs_", " − "), *cells]
        for group in main_groups(groups)
        for seed, summary in zip(group.seeds, group.summaries, strict=True)
        for name, nest in summary["paired"].items()
        for cells in tested(nest, group)
    ]
    return Section(
        "paired",
        "Paired tests",
        "Means over users of their differences; permutation test that swaps the two results of a user.",
        [Block(["task", "setting", "seed", "pair", *TESTED], rows)],
        "The paper's own tests, if it has any, are not at hand.",
    )


# -- ablation --------------------------------------------------------------------------------------

_TICKS = {"stage1": "stage 1", "stage2": "stage 2\n(P)", "stage2_sum": "stage 2\n(C+P)", "full": "full"}


def _ablation(groups: Sequence[RunGroup]) -> Section:
    rows: list[list[object]] = []
    points, tests = [], []
    for parts in _ablation_groups(groups):
        full = parts["full"]
        task = full.task.name
        cells = {measure: _ablation_cells(parts, measure) for measure in full.measures}
        for measure, ours in cells.items():
            rows.append([task, setting(full), measure, "ours", *ours])
            theirs = [ABLATION.get(task, measure, name) for name in ABLATIONS]
            if any(value is not None for value in theirs):
                rows.append([task, "the paper's", measure, "paper", *theirs])
        ticks = [tick(_TICKS[name], parts.get(name, full)) for name in ABLATIONS]
        points.append(panels(f"{task}\n{setting(full)}", "", ticks, cells))
        tests += _ablation_tests(parts)
    head = ["task", "setting", "seed", "pair", *TESTED]
    return Section(
        "ablation",
        "Ablation (Table 4)",
        "Stage 1 only is φ₂∘φ₁ as it left them (φ₁ alone where a run did not measure that); stage 2 only "
        "trains φ₂ without φ₁, at the personal rank (P) or at the sum of both (C+P).",
        [
            Block(["task", "setting", "measure", "of", *ABLATIONS.values()], rows, points=points),
            Block(head, tests, "Full against each part, runs of one seed"),
        ],
        ABLATION.cited,
    )


def _ablation_groups(groups: Sequence[RunGroup]) -> list[dict[str, RunGroup]]:
    """For each whole method that ablations belong to: {"full": …} and they, by their name."""
    found: list[dict[str, RunGroup]] = []
    for group in groups:
        name = group.get("ablation", "full")
        if name != "full" and (full := _full_method(group, groups)):
            free = next((one for one in found if one["full"] is full and name not in one), None)
            if free is None:
                found.append(free := {"full": full})
            free[name] = group
    return found


def _full_method(group: RunGroup, groups: Sequence[RunGroup]) -> RunGroup | None:
    """The whole method that an ablation leaves parts out of: with the personal rank, or the ranks' sum."""
    summed, rank = group.get("ablation") == "stage2_sum", group.ranks[1]
    return nearest(group, groups, also=lambda full: (sum(full.ranks) if summed else full.ranks[1]) == rank)


def _ablation_mode(name: str, group: RunGroup) -> str:
    if name != "stage1":
        return "personal"
    return "seed" if "seed" in group.modes else "collective"


def _ablation_cells(parts: Mapping[str, RunGroup], measure: str) -> list[Cell | None]:
    """By ablation. A whole run measures what stage 1 left too."""
    of = {"stage1": parts["full"], **parts}
    return [of[n].cell(measure, _ablation_mode(n, of[n])) if n in of else None for n in ABLATIONS]


def _ablation_tests(parts: Mapping[str, RunGroup]) -> list[list[object]]:
    """Full minus each part, user by user, for the first seed that both have (else their first seeds)."""
    full, rows = parts["full"], list[list[object]]()
    for name, label in ABLATIONS.items():
        if name == "full" or name not in parts:
            continue
        part = parts[name]
        seed = next((seed for seed in full.seeds if seed in part.seeds), None)
        one, two = (g.runs[0 if seed is None else g.seeds.index(seed)] for g in (full, part))
        found = compare(Side(one, "personal"), Side(two, _ablation_mode(name, part)))
        for cells in tested(as_json(found.against), full):
            rows.append([full.task.name, setting(full), seed, f"full − {label}", *cells])
    return rows


# -- sweeps ----------------------------------------------------------------------------------------


def _layers(groups: Sequence[RunGroup]) -> Section:
    blocks = []
    for family in sweeps(groups):
        rows = [(";".join(map(str, group.layers)), group) for group in family]
        single = sum(len(group.layers) == 1 for group in family)
        blocks.append(variants("layers", rows, but="layers", joined=single))
    about = "Blocks counted from 0; all else equal, but for a learning rate that trials chose."
    return Section("layers", "Layers (Fig. 6, Table 11)", about, blocks, not_at_hand("layers"))


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
    return Section("ranks", "Ranks (Fig. 5)", about, blocks, not_at_hand("ranks"))


def _collective_users(groups: Sequence[RunGroup]) -> Section:
    def number(group: RunGroup) -> tuple[float, str]:
        users = group.get("collective_users")
        return (float("inf"), "all") if users is None else (users, str(users))

    few = [group for group in groups if group.get("collective_users") is not None]
    return Section(
        "collective_users",
        "Few collective users (Table 14)",
        "Stage 1 saw only so many users; those measured are the same.",
        with_full_method(few, groups, "collective users", number, joined=len(groups)),
        not_at_hand("collective_users"),
    )


def _histories(groups: Sequence[RunGroup]) -> Section:
    def whose(group: RunGroup) -> tuple[float, str]:
        return (0, "own history") if group.plain else (1, "another user's history")

    swapped = [group for group in groups if group.get("histories", "own") != "own"]
    return Section(
        "histories",
        "Other users' batches (Table 15)",
        "Each user's φ₂ trained on another user's batches, measured on the user's own queries.",
        with_full_method(swapped, groups, "stage 2 trained on", whose),
        not_at_hand("histories"),
    )


def _foreign(groups: Sequence[RunGroup]) -> Section:
    def of_task(group: RunGroup) -> tuple[float, str]:
        return int(group.foreign), str(group.get("artefact_task") or group.task.name)

    return Section(
        "artefact_task",
        "Another task's collective shift (Table 16)",
        "Stage 2 on top of another task's φ₁ and seed.",
        with_full_method(
            [group for group in groups if group.foreign], groups, "collective shift of", of_task
        ),
        not_at_hand("artefact_task"),
    )


# -- seeds and costs -------------------------------------------------------------------------------


def _seeds(groups: Sequence[RunGroup]) -> Section:
    blocks = []
    for group in (group for group in groups if len(group.seeds) > 1):
        columns = columns_of(group)
        values = zip(*(group.values(*column) for column in columns.values()), strict=True)
        rows: list[list[object]] = [[seed, *row] for seed, row in zip(group.seeds, values, strict=True)]
        rows.append(["mean ± sd", *(group.cell(*column) for column in columns.values())])
        blocks.append(Block(["seed", *columns], rows, f"{caption(group)}, {variant(group)}"))
    about = "± is one standard deviation over seeds, which set stage 1's start, the batches and all draws."
    return Section("seeds", "Seeds (Table 10)", about, blocks, not_at_hand("seeds"))


def _costs(groups: Sequence[RunGroup]) -> Section:
    rows: list[list[object]] = []
    main = {id(group) for group in main_groups(groups)}
    for group in groups:
        task, users = group.task.name, group.get("users", 1)
        stage1, stage2, evaluation = (group.seconds(part) for part in ("stage1", "stage2", "evaluation"))
        seconds = [f"{stage1:.0f}", f"{stage2:.0f}", f"{stage2 / max(1, users):.1f}", f"{evaluation:.0f}"]
        width = len(group.layers) * (2 * group.get("hidden_size", 0) + 1)  # of one rank: a row of R, of W, b
        theirs = [PARAMETERS.get(task, "percent", of) for of in ("collective", "personal")]
        collective, personal = (width * rank for rank in group.ranks)
        parameters = [f"{collective:,}", f"{group.get('personal_parameters', personal):,}"]
        percent = [None if of is None or id(group) not in main else f"{of:.4f}" for of in theirs]
        rows.append([task, setting(group), variant(group), users, *seconds, *parameters, *percent])
    head = ["task", "setting", "variant", "users", "stage 1, s", "stage 2, s", "stage 2, s a user"]
    head += ["evaluation, s", "collective parameters", "personal parameters"]
    remark, source = REMARKS["seconds"]
    return Section(
        "costs",
        "Seconds and parameters",
        "Seconds of wall clock, mean over seeds. Parameters: all numbers of R, W and b of the collective "
        "shift, and of each user's; the paper's in per cent of its base model's.",
        [Block([*head, "paper: collective, %", "paper: personal, %"], rows)],
        f"{PARAMETERS.cited} Its seconds are not at hand; in words: {remark} ({source}).",
    )


SECTIONS: Sequence[Callable[[Sequence[RunGroup]], Section]] = (
    _main,
    _paired,
    _ablation,
    _layers,
    _ranks,
    _collective_users,
    _histories,
    _foreign,
    _seeds,
    _costs,
)
