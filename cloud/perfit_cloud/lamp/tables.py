"""The report's sections: which runs make which of the paper's tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from perfit_cloud.lamp.compare import Side, compare
from perfit_cloud.lamp.figures import UNITS, Heat, Points
from perfit_cloud.lamp.groups import Cell, RunGroup, main_groups, nearest, rank_grids, sweeps
from perfit_cloud.lamp.layout import (
    ABLATIONS,
    NONE,
    TESTED,
    Block,
    Section,
    around,
    caption,
    cell_of,
    cited,
    columns_of,
    not_at_hand,
    percent,
    section,
    setting,
    tested,
    text,
    tick,
    title,
    variant,
    variants,
)
from perfit_cloud.lamp.paper import ABLATION, MAIN, PARAMETERS, REMARKS
from perfit_cloud.lamp.results import MODES
from perfit_cloud.lamp.summary import as_json

__all__ = ["SECTIONS"]


def _main(groups: Sequence[RunGroup]) -> Section | None:
    rows, panels = [], []
    for group in main_groups(groups):
        for measure in group.measures:
            rows.append(
                [
                    group.task.name,
                    str(group.get("model", "")),
                    setting(group),
                    group.decoding,
                    str(group.get("users", "")),
                    str(len(group.seeds)),
                    measure,
                    *(text(group.cell(measure, mode)) for mode in MODES),
                    *(text(MAIN.get(group.task.name, measure, column)) for column in ("perfit", "oppu")),
                ]
            )
        panels.append(
            [
                Points(
                    title(group),
                    "shift",
                    UNITS[measure],
                    group.modes,
                    {measure: [group.cell(measure, mode) for mode in group.modes]},
                )
                for measure in group.measures
            ]
        )
    head = [
        "task",
        "model",
        "setting",
        "decoding",
        "users",
        "seeds",
        "measure",
        *MODES,
        "paper: PerFit",
        "paper: OPPU",
    ]
    about = (
        "base: the untouched model; collective: φ₁ alone; seed: φ₂∘φ₁ as stage 1 left them; personal: the "
        "user's φ₂ after φ₁; other: someone else's φ₂."
    )
    return section("main", "Main results", about, [Block(head, rows, points=panels)], cited(MAIN))


def _paired(groups: Sequence[RunGroup]) -> Section | None:
    rows = []
    for group in main_groups(groups):
        for seed, summary in zip(group.seeds, group.summaries, strict=True):
            for name, nest in summary["paired"].items():
                rows += [
                    [group.task.name, setting(group), str(seed), name.replace("_vs_", " − "), *cells]
                    for cells in tested(nest, group)
                ]
    head = ["task", "setting", "seed", "pair", *TESTED]
    about = "Means over users of their differences; permutation test that swaps the two results of a user."
    return section(
        "paired",
        "Paired tests",
        about,
        [Block(head, rows)],
        "The paper's own tests, if it has any, are not at hand.",
    )


def _ablation(groups: Sequence[RunGroup]) -> Section | None:
    rows, panels, tests = [], [], []
    for book in _ablation_books(groups):
        full = book["full"]
        cells = {measure: _ablation_cells(book, measure) for measure in full.measures}
        for measure, by_variant in cells.items():
            task = full.task.name
            rows.append([task, setting(full), measure, "ours", *(text(by_variant[v]) for v in ABLATIONS)])
            theirs = [ABLATION.get(task, measure, name) for name in ABLATIONS]
            if any(value is not None for value in theirs):
                rows.append([task, "the paper's", measure, "paper", *map(text, theirs)])
        ticks = [tick(_SHORT[name], book.get(name, full)) for name in ABLATIONS]
        panels.append(
            [
                Points(
                    f"{full.task.name}\n{setting(full)}",
                    "",
                    UNITS[measure],
                    ticks,
                    {measure: list(by_variant.values())},
                )
                for measure, by_variant in cells.items()
            ]
        )
        tests += _ablation_tests(book)
    head = ["task", "setting", "measure", "of", *ABLATIONS.values()]
    about = (
        "Stage 1 only is φ₂∘φ₁ as it left them (φ₁ alone where a run did not measure that); stage 2 only "
        "trains φ₂ without φ₁, at the personal rank (P) or at the sum of both (C+P)."
    )
    blocks = [
        Block(head, rows, points=panels),
        Block(
            ["task", "setting", "seed", "pair", *TESTED], tests, "Full against each part, runs of one seed"
        ),
    ]
    return section("ablation", "Ablation (Table 4)", about, blocks, cited(ABLATION))


def _ablation_books(groups: Sequence[RunGroup]) -> list[dict[str, RunGroup]]:
    """For each whole method that ablations belong to: {"full": …} and they, by their name."""
    books: list[dict[str, RunGroup]] = []
    for group in groups:
        name = group.get("ablation", "full")
        if name != "full" and (full := _whole(group, groups)):
            free = [book for book in books if book["full"] is full and name not in book]
            if not free:
                free = [{"full": full}]
                books += free
            free[0][name] = group
    return books


def _ablation_tests(book: Mapping[str, RunGroup]) -> list[list[str]]:
    """Full minus each part, user by user, for the first seed that both have (else their first seeds)."""
    full, rows = book["full"], []
    for name, told in ABLATIONS.items():
        part = book.get(name)
        if part is None or part is full:
            continue
        seed = next((seed for seed in full.seeds if seed in part.seeds), None)
        one = full.runs[0 if seed is None else full.seeds.index(seed)]
        two = part.runs[0 if seed is None else part.seeds.index(seed)]
        found = compare(Side(one, "personal"), Side(two, _mode_of(name, part)))
        rows += [
            [full.task.name, setting(full), NONE if seed is None else str(seed), f"full − {told}", *cells]
            for cells in tested(as_json(found.against), full)
        ]
    return rows


def _whole(group: RunGroup, groups: Sequence[RunGroup]) -> RunGroup | None:
    """The whole method that an ablation leaves parts out of: with the personal rank, or the ranks' sum."""
    summed = group.get("ablation") == "stage2_sum"
    return nearest(
        group, groups, also=lambda full: (sum(full.ranks) if summed else full.ranks[1]) == group.ranks[1]
    )


def _mode_of(ablation: str, group: RunGroup | None) -> str:
    if ablation != "stage1":
        return "personal"
    return "seed" if group is not None and "seed" in group.modes else "collective"


def _ablation_cells(book: Mapping[str, RunGroup], measure: str) -> dict[str, Cell | None]:
    """By ablation. A whole run measures what stage 1 left too."""
    cells: dict[str, Cell | None] = {}
    for name in ABLATIONS:
        group = book.get(name, book["full"] if name == "stage1" else None)
        cells[name] = cell_of(group, measure, _mode_of(name, group))
    return cells


_SHORT = {"stage1": "stage 1", "stage2": "stage 2\n(P)", "stage2_sum": "stage 2\n(C+P)", "full": "full"}


def _layers(groups: Sequence[RunGroup]) -> Section | None:
    blocks = [
        variants(
            "layers",
            [(";".join(map(str, group.layers)), group) for group in family],
            but="layers",
            joined=sum(len(group.layers) == 1 for group in family),
        )
        for family in sweeps(groups)
    ]
    about = "Blocks counted from 0; all else equal, but for a learning rate that trials chose."
    return section("layers", "Layers (Fig. 6, Table 11)", about, blocks, not_at_hand("layers"))


def _ranks(groups: Sequence[RunGroup]) -> Section | None:
    blocks = []
    for family in rank_grids(groups):
        by_rank = {group.ranks: group for group in family}
        collective, personal = (sorted({ranks[axis] for ranks in by_rank}) for axis in (0, 1))
        measures = family[0].measures
        cells = {
            measure: [
                [cell_of(by_rank.get((c, p)), measure, "personal") for p in personal] for c in collective
            ]
            for measure in measures
        }
        rows = [
            [measure, str(rank), *map(text, row)]
            for measure in measures
            for rank, row in zip(collective, cells[measure], strict=True)
        ]
        heat = [
            Heat(
                f"{family[0].task.name}: {measure}",
                "personal rank",
                "collective rank",
                UNITS[measure],
                [str(p) for p in personal],
                [str(c) for c in collective],
                [[None if cell is None else cell.value for cell in row] for row in cells[measure]],
            )
            for measure in measures
        ]
        head = ["measure", "collective rank", *(f"personal rank {p}" for p in personal)]
        blocks.append(Block(head, rows, caption(family[0], but="ranks"), heat=heat))
    return section(
        "ranks",
        "Ranks (Fig. 5)",
        "The personal mode; all else equal, but for a learning rate that trials chose.",
        blocks,
        not_at_hand("ranks"),
    )


def _collective_users(groups: Sequence[RunGroup]) -> Section | None:
    def number(group: RunGroup) -> tuple[float, str]:
        users = group.get("collective_users")
        return (float("inf"), "all") if users is None else (users, str(users))

    few = [group for group in groups if group.get("collective_users") is not None]
    blocks = around(few, groups, "collective users", number, joined=len(groups))
    about = "Stage 1 saw only so many users; those measured are the same."
    return section(
        "collective_users", "Few collective users (Table 14)", about, blocks, not_at_hand("collective_users")
    )


def _histories(groups: Sequence[RunGroup]) -> Section | None:
    swapped = [group for group in groups if group.get("histories", "own") != "own"]
    blocks = around(
        swapped,
        groups,
        "stage 2 trained on",
        lambda g: (0, "own history") if g.plain else (1, "another user's history"),
    )
    about = "Each user's φ₂ trained on another user's batches, measured on the user's own queries."
    return section("histories", "Other users' batches (Table 15)", about, blocks, not_at_hand("histories"))


def _foreign(groups: Sequence[RunGroup]) -> Section | None:
    foreign = [group for group in groups if group.foreign]
    blocks = around(
        foreign,
        groups,
        "collective shift of",
        lambda g: (int(g.foreign), str(g.get("artefact_task") or g.task.name)),
    )
    about = "Stage 2 on top of another task's φ₁ and seed."
    return section(
        "artefact_task",
        "Another task's collective shift (Table 16)",
        about,
        blocks,
        not_at_hand("artefact_task"),
    )


def _seeds(groups: Sequence[RunGroup]) -> Section | None:
    blocks = []
    for group in groups:
        if len(group.seeds) > 1:
            columns = columns_of(group)
            rows = [
                [str(seed), *(text(group.values(*column)[at]) for column in columns)]
                for at, seed in enumerate(group.seeds)
            ]
            rows.append(["mean ± sd", *(text(group.cell(*column)) for column in columns)])
            head = ["seed", *(f"{measure}, {mode}" for measure, mode in columns)]
            blocks.append(Block(head, rows, f"{caption(group)}, {variant(group)}"))
    about = "± is one standard deviation over seeds, which set stage 1's start, the batches and all draws."
    return section("seeds", "Seeds (Table 10)", about, blocks, not_at_hand("seeds"))


def _costs(groups: Sequence[RunGroup]) -> Section | None:
    rows = []
    main = {id(group) for group in main_groups(groups)}
    for group in groups:
        users = max(1, group.get("users", 1))
        seconds = {
            part: sum(summary["seconds"].get(part) or 0.0 for summary in group.summaries) / len(group.seeds)
            for part in ("stage1", "stage2", "evaluation")
        }
        width = len(group.layers) * (2 * group.get("hidden_size", 0) + 1)  # of one rank: a row of R, of W, b
        rows.append(
            [
                group.task.name,
                setting(group),
                variant(group),
                str(group.get("users", "")),
                f"{seconds['stage1']:.0f}",
                f"{seconds['stage2']:.0f}",
                f"{seconds['stage2'] / users:.1f}",
                f"{seconds['evaluation']:.0f}",
                *(f"{width * rank:,}" for rank in group.ranks),
                *(
                    percent(PARAMETERS.get(group.task.name, "percent", of) if id(group) in main else None)
                    for of in ("collective", "personal")
                ),
            ]
        )
    head = [
        "task",
        "setting",
        "variant",
        "users",
        "stage 1, s",
        "stage 2, s",
        "stage 2, s a user",
        "evaluation, s",
        "collective parameters",
        "personal parameters",
        "paper: collective, %",
        "paper: personal, %",
    ]
    about = (
        "Seconds of wall clock, mean over seeds. Parameters: all numbers of R, W and b of the collective "
        "shift, and of each user's; the paper's in per cent of its base model's."
    )
    remark, source = REMARKS["seconds"]
    told = f"{cited(PARAMETERS)} Its seconds are not at hand; in words: {remark} ({source})."
    return section("costs", "Seconds and parameters", about, [Block(head, rows)], told)


SECTIONS: Mapping[str, Callable[[Sequence[RunGroup]], Section | None]] = {
    "main results": _main,
    "paired tests": _paired,
    "ablation (Table 4)": _ablation,
    "layers (Fig. 6, Table 11)": _layers,
    "ranks (Fig. 5)": _ranks,
    "few collective users (Table 14)": _collective_users,
    "other users' batches (Table 15)": _histories,
    "another task's collective shift (Table 16)": _foreign,
    "seeds (Table 10)": _seeds,
    "seconds and parameters": _costs,
}
