"""The report's sections: which runs make which of the paper's tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from perfit_cloud.lamp.compare import Side, compare
from perfit_cloud.lamp.groups import Cell, RunGroup, main_groups, nearest
from perfit_cloud.lamp.layout import ABLATIONS, TESTED, Block, Section, panels, setting, tested, tick, variant
from perfit_cloud.lamp.method_tables import METHOD_SECTIONS
from perfit_cloud.lamp.paper import ABLATION, MAIN, PARAMETERS, TRAINING_TIME
from perfit_cloud.lamp.results import MODES, SECONDS
from perfit_cloud.lamp.summary import as_json
from perfit_cloud.lamp.sweep_tables import SWEEP_SECTIONS

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
        "The paper's own tests are PerFit's against OPPU: *Seeds*, below.",
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
        name = group.ablation
        if name in ABLATIONS and name != "full" and (full := _full_method(group, groups)):
            free = next((one for one in found if one["full"] is full and name not in one), None)
            if free is None:
                found.append(free := {"full": full})
            free[name] = group
    return found


def _full_method(group: RunGroup, groups: Sequence[RunGroup]) -> RunGroup | None:
    """The whole method that an ablation leaves parts out of: with the personal rank, or the ranks' sum."""
    summed, rank = group.ablation == "stage2_sum", group.ranks[1]
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
        mode = _ablation_mode(name, part)
        if "personal" not in full.modes or mode not in part.modes:
            continue
        seed = next((seed for seed in full.seeds if seed in part.seeds), None)
        one, two = (g.runs[0 if seed is None else g.seeds.index(seed)] for g in (full, part))
        found = compare(Side(one, "personal"), Side(two, mode))
        for cells in tested(as_json(found.against), full):
            rows.append([full.task.name, setting(full), seed, f"full − {label}", *cells])
    return rows


# -- costs ----------------------------------------------------------------------------------------


def _costs(groups: Sequence[RunGroup]) -> Section:
    rows: list[list[object]] = []
    main = {id(group) for group in main_groups(groups)}
    for group in groups:
        task, users = group.task.name, group.get("users", 1)
        preparation, fit, answers = (group.seconds(part) for part in SECONDS)
        seconds = [f"{preparation:.0f}", f"{fit:.0f}", f"{fit / max(1, users):.1f}", f"{answers:.0f}"]
        width = len(group.layers) * (2 * group.get("hidden_size", 0) + 1)  # of one rank: a row of R, of W, b
        theirs = [PARAMETERS.get(task, "percent", of) for of in ("collective", "personal")]
        collective, personal = (width * rank for rank in group.ranks)
        parameters = [
            f"{group.get('collective_parameters', collective):,}",
            f"{group.get('personal_parameters', personal):,}",
        ]
        percent = [None if of is None or id(group) not in main else f"{of:.4f}" for of in theirs]
        rows.append([task, setting(group), variant(group), users, *seconds, *parameters, *percent])
    head = ["task", "setting", "variant", "users", "stage 1, s", "stage 2, s", "stage 2, s a user"]
    head += ["evaluation, s", "collective parameters", "personal parameters"]
    return Section(
        "costs",
        "Seconds and parameters",
        "Seconds of wall clock, mean over seeds. Parameters: all numbers that everybody shares (R, W and b "
        "of the collective shift, or a LoRA's), and of each user's own; the paper's in per cent of its base "
        "model's.",
        [Block([*head, "paper: collective, %", "paper: personal, %"], rows)],
        f"{PARAMETERS.cited} {TRAINING_TIME}",
    )


SECTIONS: Sequence[Callable[[Sequence[RunGroup]], Section]] = (
    _main,
    _paired,
    *METHOD_SECTIONS,
    _ablation,
    *SWEEP_SECTIONS,
    _costs,
)
