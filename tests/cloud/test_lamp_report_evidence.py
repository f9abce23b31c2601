"""`lamp report` beyond PerFit's main runs: methods, groups, layers, texts, drift; and the paper's tables."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.support.lamp_reports import Runs, one_of, rows_of
from tests.support.lamp_runs import TEXTS, query, save_run, user

from perfit_cloud.lamp import paper
from perfit_cloud.lamp.groups import group_runs, main_groups
from perfit_cloud.lamp.report import write_report
from perfit_cloud.lamp.results import Run
from perfit_shared.tasks import TASKS

SECRET = "quokka"  # a word of a person's


@pytest.fixture
def runs(tmp_path: Path) -> Runs:
    return Runs(tmp_path)


def test_methods_stand_beside_each_other_and_the_paper_s(runs: Runs) -> None:
    runs.add("perfit", 1.0)
    runs.add("perfit2", 1.2, seed=1, artefact="v1", decoding={"temperature": 0.1, "seed": 1})
    plain = {"layers": [], "collective_rank": 0, "personal_rank": 0, "schedule": None}
    runs.add("rag", 1.4, method="rag", k=2, modes="base personal other", **plain)
    runs.add("none", 3.0, method="none", modes="base collective", **plain)
    runs.add("oppu", 1.1, method="oppu", personal_parameters=4000, **plain)
    runs.add("lora", 1.3, method="lora-c+perfit", lora_layers="all", collective_parameters=8000)
    runs.add("reft", 1.5, method="perfit_stage2_sum", modes="base personal")
    runs.add("others", 1.0, method="oppu", users=3, **plain)  # other people: no comparison
    text = runs.report()
    rows = [row for row in rows_of(text, "Methods (Tables 2 and 3)") if "method" in row]
    names = ["none", "rag, k = 2", "oppu", "perfit", "lora-c+perfit, all layers", "reft"]
    assert [row["method"] for row in rows] == names
    oppu = one_of(rows, method="oppu")
    assert (oppu["parameters a user"], oppu["a user, s"], oppu["paper: accuracy"]) == (
        "4,000",
        "7.5",
        "0.810",
    )
    assert oppu["loss"].startswith("1.250 [") and one_of(rows, method="perfit")["seeds"] == "2"
    assert one_of(rows, method="none")["paper: accuracy"] == "–", "the paper has none of it for labels"
    tests = [row for row in rows_of(text, "Methods (Tables 2 and 3)") if row.get("measure") == "loss"]
    against = one_of(tests, pair="perfit − oppu")
    assert (against["difference"], against["p"]) == ("-0.100", "0.1250")
    assert against["parameters a user"].endswith(" and 4,000")
    alone = [row for row in tests if row["pair"] == "rag, k = 2 − base"]
    assert len(alone) == 1 and alone[0]["p"] != "–", "a method that shares nothing has a test too"
    below = rows_of(text, "A collective LoRA below the personal shift (Table 12)")
    assert one_of(below, method="lora-c+perfit, all layers", accuracy="0.791")["macro_f1"] == "0.584"
    assert [row["method"] for row in below if "loss" in row] == ["perfit", "lora-c+perfit, all layers"]
    setting = one_of(rows_of(text, "Seconds and parameters"), variant="rag, 2 own examples")["setting"]
    assert "layers" not in setting and "None" not in setting


@pytest.mark.slow
def test_methods_whose_stage_1_saw_as_few_users_are_compared(runs: Runs) -> None:
    """Such reports had no main table, no methods, no ablation and no sweep."""
    few = {"collective_users": 60}
    no_shift = {"layers": [], "collective_rank": 0, "personal_rank": 0, "schedule": None, "artefact": None}
    for seed in (0, 1):
        seeded = {"seed": seed, "decoding": {"temperature": 0.1, "seed": seed}}
        lora = {"lora": {"version": f"l{seed}"}, "collective_parameters": 9000}
        runs.add(f"perfit{seed}", 1.0, artefact=f"v{seed}", **few, **seeded)
        runs.add(
            f"lora{seed}", 1.3, method="lora-c", modes="base collective", **few, **no_shift, **lora, **seeded
        )
        # These two are given the shift or LoRA of the runs before.
        runs.add(f"oppu{seed}", 1.1, method="oppu", **no_shift, **lora, **seeded)
        runs.add(
            f"first{seed}",
            2.0,
            method="perfit_stage1",
            modes="base collective",
            artefact=f"v{seed}",
            **seeded,
        )
    runs.add("rag", 1.4, method="rag", k=4, modes="base personal other", **no_shift)
    runs.add("ten", 1.5, collective_users=10, artefact="v10")
    runs.add("oppu10", 1.6, method="oppu", collective_users=10, lora={"version": "l10"}, **no_shift)
    text = runs.report()
    title = "Methods (Tables 2 and 3)"
    rows = [row for row in rows_of(text, title) if "method" in row]
    assert [(row["method"], row["seeds"]) for row in rows] == [
        *(("rag, k = 4", "1"), ("lora-c", "2"), ("oppu", "2"), ("perfit", "2"))
    ]
    assert {row["setting"] for row in rows_of(text, "Main results")} == {
        "layers 2;3, ranks 8/4, f7+l7, 60 collective users, task prompts, device schedule"
    }
    assert any(row.get("pair") == "full − stage 1 only" for row in rows_of(text, "Ablation (Table 4)"))
    few_rows = [row for row in rows_of(text, "Few collective users (Table 14)") if "loss, personal" in row]
    assert [row["collective users"] for row in few_rows] == ["10", "10, oppu", "60"]
    costs = rows_of(text, "Seconds and parameters")
    assert one_of(costs, variant="lora-c, 60 collective users")["collective parameters"] == "9,000"
    whole = len(runs.folders)
    runs.folders = [
        folder for folder in runs.folders if folder.name not in {"lora0", "lora1", "oppu0", "oppu1"}
    ]
    methods = [row["method"] for row in rows_of(runs.report(), title) if "method" in row]
    assert methods == ["rag, k = 4", "oppu, 10 collective users", "perfit"], (
        "named where there is no better one"
    )
    runs.folders = [runs.root / name for name in ("lora0", "oppu0", "rag")]
    assert len(runs.folders) < whole
    alone = rows_of(runs.report(), title)
    pairs = {row["pair"] for row in alone if "pair" in row and not row["pair"].endswith("− base")}
    assert pairs == {"lora-c − oppu", "lora-c − rag, k = 4"}


@pytest.mark.slow
def test_short_histories_stand_beside_each_other_by_their_start(runs: Runs) -> None:
    """And none of them is a row of the main table."""
    for length, plain, community, retrieved in (
        (0, 2.0, 1.9, 2.0),
        (10, 1.5, 1.2, 1.3),
        (None, 1.0, 1.0, 0.9),
    ):
        cut = {"examples": length, "data": f"history of {length}"}
        runs.add(f"plain{length}", plain, **cut)
        runs.add(f"communities{length}", community, communities=4, **cut)
        runs.add(f"rag{length}", retrieved, method="perfit+rag", k=4, **cut)
    text = runs.report()
    rows = rows_of(text, "Cold start")
    assert [row["examples"] for row in rows] == ["0"] * 3 + ["10"] * 3 + ["all"] * 3
    assert {row["start"] for row in rows if row["loss − plain seed"] == "–"} == {"plain seed"}
    ten = one_of(rows, examples="10", start="seeds of 4 communities")
    assert ten["loss"].startswith("1.350 [")
    assert (ten["loss − plain seed"], ten["p"], ten["users better"]) == ("-0.300", "0.1250", "4 of 4")
    assert one_of(rows, examples="all", start="plain seed, 4 own examples in the prompt")["p"] == "0.1250"
    assert (runs.root / "report" / "cold_start.png").is_file()
    assert {row["measure"] for row in rows_of(text, "Main results")} == {"loss", "accuracy", "macro_f1"}
    assert len(rows_of(text, "Main results")) == 2 * 3, "the whole histories alone, by start"


def test_of_short_histories_alone_the_longest_is_the_main_one(runs: Runs) -> None:
    """Another run on 10 examples took the place of the methods' table, and two ways shared one line."""
    for length in (10, 40):
        cut = {"examples": length, "data": f"history of {length}"}
        runs.add(f"plain{length}", 1.5, **cut)
        runs.add(f"rag{length}", 1.3, method="perfit+rag", k=4, **cut)
        runs.add(f"behind{length}", 1.2, method="perfit_behind+rag", k=4, **cut)
    runs.add("oppu", 1.4, method="oppu", examples=40, data="history of 40")
    groups = group_runs(Run.load(folder) for folder in runs.folders)
    assert {group.get("examples") for group in main_groups(groups)} == {40}
    text = runs.report()
    starts = [row["start"] for row in rows_of(text, "Cold start")][3:]
    behind = "plain seed, update behind 4 own examples in the prompt"
    assert set(starts) == {"plain seed", behind, "plain seed, 4 own examples in the prompt"}
    methods = rows_of(text, "Methods (Tables 2 and 3)")
    assert {row["method"] for row in methods if "method" in row} == {
        *("oppu", "perfit", "perfit+rag, k = 4", "perfit_behind+rag, k = 4")
    }


@pytest.mark.slow
def test_groups_of_collective_users_and_their_variance(runs: Runs) -> None:
    runs.add("full", 0.9)
    losses = (1.0, 1.2, 1.1)
    for group, loss in enumerate(losses):
        runs.add(f"g{group}", loss, collective_group=group, artefact=f"v{group + 1}")
    rows = rows_of(runs.report(), "Groups of collective users (Table 15)")
    ours = [row for row in rows if "loss, personal" in row]
    assert [row["group"] for row in ours] == ["0", "1", "2", "variance"]
    assert float(ours[-1]["loss, personal"]) == pytest.approx(statistics.pvariance(losses), rel=0.05)
    theirs = [row for row in rows if "loss, personal" not in row]
    assert [row["accuracy"] for row in theirs] == ["0.804", "0.808", "0.804", "0.809", "0.810", "6.0e-06"]
    main = rows_of(runs.report(), "Main results")
    assert {row["personal"][:5] for row in main if row["measure"] == "loss"} == {"1.050"}, (
        "the full run alone"
    )


@pytest.mark.slow
def test_numbers_of_layers_are_drawn_apart(runs: Runs) -> None:
    for layers in ([3], [1, 5], [0, 2, 4, 6], [2, 3]):
        runs.add(f"l{layers}", 1 + len(layers) / 10, layers=layers)
    rows = rows_of(runs.report(), "Number of layers (Fig. 6)")
    assert [row["number of layers"] for row in rows] == ["1: 3", "2: 1;5", "4: 0;2;4;6"], "[2, 3] lies aside"
    assert (runs.root / "report" / "layer_counts.png").is_file()


def _texts(folder: Path, **settings: Any) -> Path:
    """Golds "the cat quokka": the cat is asked, quokka the person's own word."""
    answers = {"base": "a cat", "personal": f"the {SECRET} cat"}
    queries = [
        replace(query(at, f"the cat {SECRET}", answers, {"base": 2.0, "personal": 1.0}), origins="omw")
        for at in range(2)
    ]
    users = [user(f"{SECRET}-{name}", queries) for name in "ab"]
    return save_run(folder, TEXTS, users, users=2, **settings).folder


@pytest.mark.slow
def test_texts_are_measured_and_can_be_left_out(tmp_path: Path) -> None:
    folder = _texts(tmp_path / "run")
    answered = {"log_likelihoods": [-3.0, -4.0], "same": [True, False]}
    (folder / "drift.json").write_text(
        json.dumps({"tokens": [2, 3], "base": [-1.0, -2.0], "shared": {"collective": answered}})
    )
    for each in folder.glob("users/*"):
        (each / "drift.json").write_text(json.dumps(answered))
    results = [
        {
            "task": "boolq",
            "metric": "acc",
            "queries": 9,
            "off": 0.8,
            "on": 0.7,
            "off_error": 0.1,
            "on_error": None,
        }
    ]
    data = {"model": "tiny", "artefact_task": "news_headline", "results": results}
    (folder / "capabilities.json").write_text(json.dumps(data))
    shown = write_report([folder], tmp_path / "shown").read_text("utf-8")
    row = one_of(rows_of(shown, "Texts beside ROUGE"), mode="personal")
    assert [row[name].split(" ")[0] for name in row if name.startswith("shared")] == ["0.333"] * 3
    assert row["length over the person's"].startswith("1.000")
    row = one_of(rows_of(shown, "Drift on prompts that concern nobody"), mode="personal")
    # (−1 − −3 + −2 − −4) over 5 tokens, of both users alike.
    assert (row["nats a token lost"], row["answers unchanged"]) == ("+0.800 [+0.800, +0.800]", "50.0%")
    able = rows_of(shown, "General capabilities (Tables 17 and 18)")
    assert (able[0]["off"], able[0]["on"], able[0]["on − off"]) == ("0.800", "0.700", "-0.100")
    assert one_of(able, task="qnli")["on"] == "0.648"
    assert SECRET in shown and "the cat" in shown

    left = tmp_path / "left"
    write_report([folder], left, texts=False)
    for file in left.rglob("*"):
        assert SECRET.encode() not in file.read_bytes() and b"a cat" not in file.read_bytes(), file
    assert "## Answers" not in (left / "report.md").read_text("utf-8")


# -- the paper ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("table", "tasks", "rows"),
    [
        (paper.MAIN, "2N 2M 3 4 5 7", 11),
        (paper.ABLATION, "2N 2M 4 7", 5),
        (paper.SEEDS, "2N 2M 3 4 5 7", 5),
        (paper.LAYERS, "2M 2N 4", 7),
        (paper.LORA_BELOW, "2N 2M 4 7", 3),
        (paper.FEW_USERS, "2N 2M 4 7", 4),
        (paper.COLLECTIVE_GROUPS, "2M 2N 7", 6),
        (paper.OTHER_TASKS, "2M 2N 4 7", 4),
        (paper.RANKS, "2M 2N 3 4 5 7", 4),
        (paper.DATA, "2M 2N 3 4 5 7", 9),
    ],
)
def test_every_table_of_the_paper_is_whole(table: paper.PaperTable, tasks: str, rows: int) -> None:
    named = {task.lamp.removeprefix("LaMP_"): name for name, task in TASKS.items() if task.lamp}
    assert set(table.figures) == {named[short] for short in tasks.split()}
    most = max(len(table.rows(task)) for task in table.figures)
    assert most == rows
    for task, measures in table.figures.items():
        sizes = {len(of) for of in measures.values()}
        assert len(sizes) == 1, (task, "a figure of a pair is missing")


def test_the_paper_s_tables_agree_with_each_other() -> None:
    """The same run stands in several tables."""
    main: Callable[[str, str, str], float | None] = paper.MAIN.get
    for task, measures in paper.SEEDS.figures.items():
        for measure, rows in measures.items():
            assert (rows["perfit, mean"], rows["oppu, mean"]) == (
                main(task, measure, "perfit"),
                main(task, measure, "oppu"),
            )
    for table in (paper.LORA_BELOW, paper.ABLATION):
        for task, measures in table.figures.items():
            for measure, rows in measures.items():
                own = rows["perfit" if table is paper.LORA_BELOW else "full"]
                assert own == main(task, measure, "perfit")
    groups = paper.COLLECTIVE_GROUPS
    for task, measures in groups.figures.items():
        for measure in measures:
            values = [float(groups.get(task, measure, str(at)) or 0) for at in range(5)]
            printed = float(groups.get(task, measure, "variance") or 0)
            assert statistics.pvariance(values) == pytest.approx(printed, rel=0.2, abs=1e-6)
