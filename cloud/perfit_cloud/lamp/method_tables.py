"""The report's sections on methods beside PerFit, other measures, drift, data and base models."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from perfit_cloud.harness import RESULTS_FILE
from perfit_cloud.lamp.compare import Side, compare
from perfit_cloud.lamp.groups import RunGroup, main_groups
from perfit_cloud.lamp.layout import TESTED, Block, Section, beside, caption, setting, tested
from perfit_cloud.lamp.paper import BACKBONES, CAPABILITIES, DATA, LORA_BELOW, MAIN
from perfit_cloud.lamp.results import MODES
from perfit_cloud.lamp.rivals import answering, by_reference, label, row_of
from perfit_cloud.lamp.scores import is_text
from perfit_cloud.lamp.summary import as_json
from perfit_cloud.lamp.text_scores import NAMES
from perfit_shared.errors import InvalidData

__all__ = ["METHOD_SECTIONS", "text_section"]

_SHOWN = 3  # queries of a user beside each other, of as many users
_TITLES = {
    "meteor": "METEOR (equal words and stems)",
    "chrf": "chrF",
    "matter": "shared: the query's words",
    "wording": "shared: the person's wording",
    "other_overlap": "shared: other words",
    "length_ratio": "length over the person's",
    "edit_distance": "edit distance",
}


# -- methods ---------------------------------------------------------------------------------------


def _methods(groups: Sequence[RunGroup]) -> Section:
    blocks = []
    for full, others in by_reference(groups):
        if full.plain and not others:
            continue
        measures = full.measures
        rows: list[list[object]] = []
        for group in sorted([full, *others], key=lambda each: _order(row_of(each))):
            cells = [group.cell(measure, answering(group)) for measure in measures]
            theirs = [MAIN.get(full.task.name, measure, row_of(group)) for measure in measures[1:]]
            parameters, seconds = _costs(group)
            shared = f"{group.seconds('preparation'):.0f}"
            rows.append([label(group), parameters, shared, seconds, len(group.seeds), *cells, *theirs])
        head = ["method", "parameters a user", "shared, s", "a user, s", "seeds", *measures]
        head += [f"paper: {measure}" for measure in measures[1:]]
        blocks.append(Block(head, rows, caption(full)))
        tests = f"{label(full)} against each, runs of one seed"
        head = ["pair", *TESTED, "parameters a user", "a user, s"]
        blocks.append(Block(head, _method_tests(full, others), tests))
        against_base = [row for group in [full, *others] for row in _base_tests(group)]
        blocks.append(Block(["pair", "seed", *TESTED], against_base, "Each against the untouched model"))
    return Section(
        "methods",
        "Methods (Tables 2 and 3)",
        "Same people, prompts and decoding. A method without anything personal answers with what it shares. "
        "Tests are paired by user: permutations that swap the two results of one.",
        blocks,
        MAIN.cited,
    )


def _order(row: str) -> tuple[int, str]:
    rows = [name for of in MAIN.figures["news_headline"].values() for name in of]
    return (rows.index(row) if row in rows else len(rows), row)


def _method_tests(full: RunGroup, others: Sequence[RunGroup]) -> list[list[object]]:
    rows: list[list[object]] = []
    for other in others:
        seed = next((seed for seed in full.seeds if seed in other.seeds), None)
        one, two = (g.runs[0 if seed is None else g.seeds.index(seed)] for g in (full, other))
        found = compare(Side(one, answering(full)), Side(two, answering(other)))
        pair = f"{label(full)} − {label(other)}"
        costs = [" and ".join(of) for of in zip(_costs(full), _costs(other), strict=True)]
        rows += [[pair, *cells, *costs] for cells in tested(as_json(found.against), full)]
    return rows


def _costs(group: RunGroup) -> tuple[str, str]:
    """Numbers that fitting one person learns, and the seconds that it takes."""
    users = max(1, group.get("users", 1))
    return f"{group.get('personal_parameters', 0):,}", f"{group.seconds('fit') / users:.1f}"


def _base_tests(group: RunGroup) -> list[list[object]]:
    mode = answering(group)
    if mode == "base" or "base" not in group.modes:
        return []
    return [
        [f"{label(group)} − base", seed, *cells]
        for seed, summary in zip(group.seeds, group.summaries, strict=True)
        for cells in tested(summary["paired"][f"{mode}_vs_base"], group)
    ]


def _lora_below(groups: Sequence[RunGroup]) -> Section:
    blocks, drawn = [], []
    for full, others in by_reference(groups):
        below = [group for group in others if group.method == "lora-c+perfit"]
        rows = [
            [label(g), f"{g.get('collective_parameters', 0):,}", *(g.cell(m, "personal") for m in g.measures)]
            for g in below
        ]
        if rows and full.plain:
            drawn.append(full)
            rows.insert(0, ["perfit", None, *(full.cell(m, "personal") for m in full.measures)])
            blocks.append(Block(["method", "collective parameters", *full.measures], rows, caption(full)))
    return Section(
        "lora_below",
        "A collective LoRA below the personal shift (Table 12)",
        "Stage 1 is a LoRA in place of a shift; stage 2 is PerFit's.",
        beside(blocks, drawn, LORA_BELOW, "method"),
        LORA_BELOW.cited,
    )


def _base_models(groups: Sequence[RunGroup]) -> Section:
    by_task: dict[str, list[RunGroup]] = {}
    for group in main_groups(groups):
        by_task.setdefault(group.task.name, []).append(group)
    several = [found for found in by_task.values() if len({g.get("fingerprint") for g in found}) > 1]
    blocks = [
        Block(
            ["base model", "setting", *found[0].measures],
            [[g.get("model"), setting(g), *(g.cell(m, "personal") for m in g.measures)] for g in found],
            found[0].task.name,
        )
        for found in several
    ]
    drawn = [group for found in several for group in found]
    return Section(
        "base_models",
        "Base models (Table 13)",
        "PerFit's personal mode.",
        beside(blocks, drawn, BACKBONES, "base model, method"),
        BACKBONES.cited,
    )


# -- other measures --------------------------------------------------------------------------------


def _texts(groups: Sequence[RunGroup]) -> Section:
    rows: list[list[object]] = []
    shown = [group for full, others in by_reference(groups) for group in (full, *others)]
    for group in (group for group in shown if is_text(group.task)):
        for mode in group.modes:
            cells = [group.cell(name, mode) for name in NAMES]
            if any(cells):
                rows.append([group.task.name, label(group), setting(group), mode, *cells])
    return Section(
        "texts",
        "Texts beside ROUGE",
        "METEOR by nltk without its stage of synonyms, which needs WordNet, so lower than full METEOR; chrF "
        "by sacrebleu. Of the words that answers share with the person's own text: those of the query's "
        "input (matter), those that are not and that the person uses often (wording: in two or more of their "
        "past answers and in one of twenty), and the rest; the three sum to 1. Length is of all words, best "
        "at 1; edit distance is Levenshtein's by rapidfuzz over the longer text, lower is better.",
        [Block(["task", "method", "setting", "mode", *_TITLES.values()], rows)],
        "The paper does not measure these.",
    )


def _drift(groups: Sequence[RunGroup]) -> Section:
    rows: list[list[object]] = []
    for group in groups:
        for mode in MODES:
            found = [s["drift"][mode] for s in group.summaries if mode in s.get("drift", {})]
            if not found:
                continue
            bounds = found[0]["intervals"]["nats"] if len(found) == 1 else None
            nats = f"{statistics.fmean(each['nats'] for each in found):+.3f}"
            if bounds is not None:
                nats += f" [{bounds[0]:+.3f}, {bounds[1]:+.3f}]"
            unchanged = f"{statistics.fmean(each['unchanged'] for each in found):.1%}"
            rows.append(
                [group.task.name, label(group), setting(group), mode, nats, unchanged, found[0]["prompts"]]
            )
    head = ["task", "method", "setting", "mode", "nats a token lost", "answers unchanged", "prompts"]
    return Section(
        "drift",
        "Drift on prompts that concern nobody",
        "How much less likely the untouched model's own greedy answer becomes, and how often the greedy "
        "answer stays the same text. 0 nats and 100 % is no drift.",
        [Block(head, rows)],
        "The paper does not measure this.",
    )


def _capabilities(groups: Sequence[RunGroup]) -> Section:
    rows: list[list[object]] = []
    for group in groups:
        for run in group.runs:
            path = run.folder / RESULTS_FILE
            if not path.is_file():
                continue
            try:
                data = json.loads(path.read_text("utf-8"))
                for one in data["results"]:
                    figures = [float(one["off"]), float(one["on"])]
                    gap = f"{figures[1] - figures[0]:+.3f}"
                    label = [data["model"], data["artefact_task"], one["task"], one["metric"]]
                    rows.append([*label, one["queries"], *figures, gap])
            except (ValueError, TypeError, KeyError) as error:
                raise InvalidData(f"{path} is not of `perfit-cloud capabilities`") from error
    paper: list[list[object]] = [
        [model, task, CAPABILITIES.get(model, "off", task), CAPABILITIES.get(model, "on", task)]
        for model, ways in CAPABILITIES.figures.items()
        for task in ways["off"]
    ]
    head = ["model", "shift of", "task", "metric", "queries", "off", "on", "on − off"]
    blocks = [Block(head, rows)]
    if rows:
        blocks.append(Block(["model, shift of", "task", "off", "on"], paper, "The paper's"))
    return Section(
        "capabilities",
        "General capabilities (Tables 17 and 18)",
        "By lm-eval-harness (`perfit-cloud capabilities --out RUN`).",
        blocks,
        CAPABILITIES.cited,
    )


def _data(groups: Sequence[RunGroup]) -> Section:
    rows: list[list[object]] = []
    for group in main_groups(groups):
        users = group.runs[0].figures
        queries, history = sum(u.queries for u in users), statistics.fmean(u.examples for u in users)
        theirs = [DATA.get(group.task.name, "data", name) for name in ("users 2", "queries 2", "history 2")]
        paper = [None if figure is None else f"{figure:,.1f}".removesuffix(".0") for figure in theirs]
        rows.append([group.task.name, len(users), queries, f"{history:.1f}", *paper])
    head = ["task", "users", "queries", "past examples a user"]
    return Section(
        "data",
        "Data of stage 2 (Table 6)",
        "Those who are measured.",
        [Block([*head, *(f"paper: {name}" for name in head[1:])], rows)],
        DATA.cited,
    )


# -- people's own texts ----------------------------------------------------------------------------


def text_section(groups: Sequence[RunGroup]) -> Section:
    """Answers beside golds: the only section with texts of people."""
    rows: list[list[object]] = []
    for group in main_groups(groups):
        for user in group.runs[0].users[:_SHOWN]:
            for query in user.queries[:_SHOWN]:
                answers = [query.answers.get(mode) for mode in ("base", "collective", "personal")]
                rows.append([group.task.name, user.user_id, query.gold, *answers])
    return Section(
        "answers",
        "Answers",
        f"The first {_SHOWN} queries of the first {_SHOWN} users.",
        [
            Block(
                ["task", "user", "their own", "base", "collective", "personal"], [_one_line(r) for r in rows]
            )
        ],
        "With `--no-texts` this section is left out: everything else is figures.",
    )


def _one_line(row: Sequence[Any]) -> list[object]:
    return [" ".join(cell.split()) if isinstance(cell, str) else cell for cell in row]


METHOD_SECTIONS: Sequence[Callable[[Sequence[RunGroup]], Section]] = (
    _methods,
    _lora_below,
    _base_models,
    _texts,
    _drift,
    _capabilities,
    _data,
)
