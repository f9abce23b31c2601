"""`perfit-cloud lamp report`: which runs make which table, and that the numbers in it are theirs."""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest
import typer
from matplotlib import image
from tests.support.lamp_reports import LOSSES, Runs, one_of, rows_of
from tests.support.lamp_runs import LABELS, TEXTS, save_run, simple_users
from typer.testing import CliRunner

from perfit_cloud.cli.lamp.report import report as command
from perfit_cloud.lamp import paper
from perfit_cloud.lamp.groups import collective_sizes, group_runs, main_groups, nearest, rank_grids, sweeps
from perfit_cloud.lamp.layout import variant
from perfit_cloud.lamp.report import write_report
from perfit_cloud.lamp.results import Run
from perfit_shared.errors import InvalidData, InvalidInput
from perfit_shared.prompts import with_prompts
from perfit_shared.tasks import TASKS


@pytest.fixture
def runs(tmp_path: Path) -> Runs:
    return Runs(tmp_path)


# -- the main table ----------------------------------------------------------------------------


def test_main_table_has_our_numbers_beside_the_paper_s(runs: Runs) -> None:
    runs.add("labels")
    runs.add("texts", task=TEXTS)
    text = runs.report()
    rows = rows_of(text, "Main results")
    loss = one_of(rows, task="news_categorize", measure="loss")
    assert loss["personal"].startswith("1.150 [")  # the users' 1.0, 1.1, 1.2, 1.3
    assert loss["base"].startswith("3.150 [")
    assert (loss["paper: PerFit"], loss["users"], loss["seeds"]) == ("–", "4", "1")
    accuracy = one_of(rows, task="news_categorize", measure="accuracy")
    assert accuracy["base"] == "0.000 [0.000, 0.000]"
    assert (accuracy["paper: PerFit"], accuracy["paper: OPPU"]) == ("0.818", "0.810")
    assert one_of(rows, task="news_headline", measure="rouge_l")["paper: PerFit"] == "0.186"
    assert "Llama-2-7B" in text
    assert "No runs for: methods (Tables 2 and 3), a collective LoRA" in text
    assert "data of stage 2" not in text.split("No runs for:")[1]


def test_seeds_become_one_row_with_their_spread(runs: Runs) -> None:
    losses = (1.0, 1.3, 1.1)
    for seed, loss in enumerate(losses):
        runs.add(
            f"s{seed}", loss, seed=seed, artefact=f"v{seed}", decoding={"temperature": 0.1, "seed": seed}
        )
    runs.add("hotter", 2.0, seed=3, decoding={"temperature": 0.7, "seed": 3})
    text = runs.report()
    means = [loss + 0.15 for loss in losses]
    expected = f"{statistics.fmean(means):.3f} ± {statistics.stdev(means):.3f}"
    rows = [row for row in rows_of(text, "Main results") if row["measure"] == "loss"]
    assert [(row["seeds"], row["personal"].split(" [")[0]) for row in rows] == [
        ("3", expected),
        ("1", "2.150"),
    ]
    seeds = [row for row in rows_of(text, "Seeds (Table 10)") if "seed" in row]
    assert [row["loss, personal"] for row in seeds] == ["1.150", "1.450", "1.250", expected]
    assert [row["seed"] for row in seeds] == ["0", "1", "2", "mean ± sd"]
    theirs = one_of(rows_of(text, "Seeds (Table 10)"), seeds="perfit, sd")
    assert (theirs["accuracy"], theirs["macro_f1"]) == ("3.2e-05", "2.8e-05")


def test_one_seed_with_two_artefacts_is_two_settings(runs: Runs) -> None:
    runs.add("a", artefact="v0")
    runs.add("b", artefact="v1")
    assert len(rows_of(runs.report(), "Main results")) == 6


def test_paired_tests_are_those_of_the_summary(runs: Runs) -> None:
    runs.add("full")
    row = one_of(rows_of(runs.report(), "Paired tests"), pair="personal − collective", measure="loss")
    assert (row["difference"], row["p"], row["users better"]) == ("-1.000", "0.1250", "4 of 4")
    assert row["95 % interval"] == "[-1.000, -1.000]"


# -- variants ----------------------------------------------------------------------------------


def _ablations(runs: Runs) -> None:
    runs.add("full", 1.0)
    runs.add("stage1", 1.9, ablation="stage1", modes="base collective")
    runs.add("stage2", 1.5, ablation="stage2", modes="base personal other", collective_rank=0)
    runs.add(
        "sum", 1.4, ablation="stage2_sum", modes="base personal other", collective_rank=0, personal_rank=12
    )


def test_ablation(runs: Runs) -> None:
    _ablations(runs)
    text = runs.report()
    rows = rows_of(text, "Ablation (Table 4)")
    loss = one_of([r for r in rows if "of" in r], measure="loss", of="ours")
    names = ("stage 1 only", "stage 2 only (P)", "stage 2 only (C+P)", "full")
    assert [loss[name].split(" ")[0] for name in names] == ["2.050", "1.650", "1.550", "1.150"]
    theirs = one_of([r for r in rows if "of" in r], measure="accuracy", of="paper")
    assert [theirs[name] for name in names] == ["0.792", "0.801", "0.803", "0.818"]
    tests = [r for r in rows if r.get("measure") == "loss" and "pair" in r]
    assert [(r["pair"], r["difference"], r["p"]) for r in tests] == [
        ("full − stage 1 only", "-0.900", "0.1250"),
        ("full − stage 2 only (P)", "-0.500", "0.1250"),
        ("full − stage 2 only (C+P)", "-0.400", "0.1250"),
    ]
    assert (runs.root / "report" / "ablation.png").is_file()


@pytest.mark.slow
def test_an_ablation_finds_the_run_of_its_ranks(runs: Runs) -> None:
    """Among full runs of several ranks: 8 + 4 = 12 and 4 are those of the 8/4 run."""
    _ablations(runs)
    for ranks in ((4, 4), (4, 2), (8, 2)):
        runs.add(f"r{ranks}", 0.5, collective_rank=ranks[0], personal_rank=ranks[1])
    runs.add("sum-8-2", 1.2, ablation="stage2_sum", collective_rank=0, personal_rank=10)
    rows = [r for r in rows_of(runs.report(), "Ablation (Table 4)") if r.get("of") == "ours"]
    row = one_of(rows, measure="loss", setting="layers 2;3, ranks 8/4, f7+l7, task prompts, device schedule")
    assert row["stage 2 only (C+P)"].startswith("1.550")
    row = one_of(rows, measure="loss", setting="layers 2;3, ranks 8/2, f7+l7, task prompts, device schedule")
    assert row["stage 2 only (C+P)"].startswith("1.350")
    assert row["stage 1 only"].startswith("2.150")  # the full run's own collective mode


@pytest.mark.slow
def test_layers_and_ranks(runs: Runs) -> None:
    runs.add("main", users=24)
    for layer in (0, 1, 2):
        runs.add(f"l{layer}", 1.0 + layer / 10, layers=[layer], learning_rate=1e-3 * (layer + 1))
    for ranks in ((2, 4), (2, 8), (6, 4), (6, 8)):
        runs.add(f"r{ranks}", ranks[0] + ranks[1] / 10, collective_rank=ranks[0], personal_rank=ranks[1])
    text = runs.report()
    layers = [row for row in rows_of(text, "Layers (Table 11)") if "layers" in row]
    assert [row["layers"] for row in layers] == ["0", "1", "2"]
    theirs = [row for row in rows_of(text, "Layers (Table 11)") if "layer of 32" in row]
    assert [row["accuracy"] for row in theirs[-2:]] == ["0.795", "0.000"]
    assert layers[2]["loss, personal"].startswith("1.350")
    ranks = rows_of(text, "Ranks (Fig. 5)")
    row = next(r for r in ranks if (r["measure"], r["collective rank"]) == ("loss", "6"))
    assert (row["personal rank 4"][:5], row["personal rank 8"][:5]) == ("6.550", "6.950")
    # What explores is not the method's result.
    assert {row["users"] for row in rows_of(text, "Main results")} == {"24"}
    for name in ("layers.png", "ranks.png", "main.png"):
        pixels = image.imread(runs.root / "report" / name)
        assert pixels.shape[0] > 200
        assert pixels.std() > 0.05  # something is drawn
    assert "Figure 5 is a picture without printed numbers" in text


def test_of_a_grid_alone_one_run_stands_for_the_method(runs: Runs) -> None:
    for collective in (2, 6):
        for personal in (4, 8):
            runs.add(f"r{collective}-{personal}", collective_rank=collective, personal_rank=personal)
    runs.add("again", collective_rank=6, personal_rank=4, seed=1)
    rows = rows_of(runs.report(), "Main results")
    setting = "layers 2;3, ranks 6/4, f7+l7, task prompts, device schedule"
    assert {(row["setting"], row["seeds"]) for row in rows} == {(setting, "2")}


@pytest.mark.slow
def test_collective_users_other_histories_and_other_tasks(runs: Runs) -> None:
    runs.add("full", 1.0)
    runs.add("more", 0.9, users=24)
    runs.add("c100", 1.1, collective_users=100, artefact="v100")
    runs.add("c10", 1.2, collective_users=10, artefact="v10")
    runs.add("swap", 2.2, histories="other")
    runs.add("foreign", 1.4, artefact_task="news_headline")
    text = runs.report()

    def column(title: str) -> list[tuple[str, str]]:
        ours = (row for row in rows_of(text, title) if "loss, personal" in row)
        return [(next(iter(row.values())), row["loss, personal"][:5]) for row in ours]

    few = [("10", "1.350"), ("100", "1.250"), ("all", "1.150")]
    assert column("Few collective users (Table 14)") == few
    swapped = [("own history", "1.150"), ("another user's history", "2.350")]
    assert column("Another user's history") == swapped
    foreign = [("news_categorize", "1.150"), ("news_headline", "1.550")]
    assert column("Another task's collective shift (Table 16)") == foreign


def test_costs(runs: Runs) -> None:
    _ablations(runs)
    rows = rows_of(runs.report(), "Seconds and parameters")
    full = one_of(rows, variant="full")
    # 2 layers, R and W of 16 numbers a rank, b of 1; ranks 8 and 4.
    assert (full["collective parameters"], full["personal parameters"]) == ("528", "264")
    assert (full["stage 1, s"], full["stage 2, s a user"]) == ("100", "7.5")
    assert full["paper: personal, %"] == "0.0117"
    assert one_of(rows, variant="stage 2 only (C+P)")["collective parameters"] == "0"


# -- groups ------------------------------------------------------------------------------------


def test_nearest_keeps_to_the_same_test_users(tmp_path: Path) -> None:
    users = simple_users(LOSSES)
    made = [
        save_run(tmp_path / "24", LABELS, users, users=24),
        save_run(tmp_path / "3", LABELS, users, users=3, epochs=5),
        save_run(tmp_path / "few", LABELS, users, users=3, collective_users=10, artefact="v10"),
        save_run(tmp_path / "other", LABELS, users, users=3, fingerprint="f1"),
    ]
    groups = group_runs(made)
    few = next(group for group in groups if group.get("collective_users"))
    found = nearest(few, groups)
    assert found is not None
    assert (found.get("users"), found.get("fingerprint"), found.get("epochs")) == (3, "f0", 5)
    assert [group.get("users") for group in main_groups(groups)] == [24, 3, 3]
    assert sweeps(groups) == rank_grids(groups) == []


@pytest.mark.slow
def test_nothing_is_taken_from_runs_of_other_prompts_or_decoding(runs: Runs) -> None:
    """An ablation was put beside the whole method asked in other words, without a word on it."""
    oppu = with_prompts(TASKS[LABELS.name], "oppu")
    runs.add("full")
    runs.add("oppu", task=oppu)
    runs.add("part", ablation="stage2", task=oppu, modes="base personal")
    groups = group_runs(Run.load(folder) for folder in runs.folders)
    part = next(group for group in groups if not group.plain)
    found = nearest(part, groups)
    assert found is not None and found.get("prompts") == "oppu"
    assert nearest(part, [group for group in groups if group is not found]) is None
    runs.add("lamp part", ablation="stage2", task=with_prompts(LABELS, "lamp"), modes="base personal")
    of_lamp = Run.load(runs.folders.pop())
    assert (of_lamp.prompts, of_lamp.decoding) == ("lamp", Run.load(runs.folders[0]).decoding)
    assert nearest(group_runs([of_lamp])[0], groups) is None, "prompts alone keep them apart"
    text = runs.report()
    rows = rows_of(text, "Main results")
    assert {(row["setting"].split(", ")[-2], row["decoding"]) for row in rows} == {
        ("task prompts", 'temperature 0.1, up to 48 tokens, to "\\n"'),
        ("oppu prompts", "temperature 0.1, up to 200 tokens, no stop"),
    }
    told = "oppu prompts, device schedule, 4 users, seed 0; temperature 0.1, up to 200 tokens, no stop"
    assert told in text.split("## Runs")[1]


def test_a_collective_shift_trained_with_other_prompts_is_no_plain_run(runs: Runs) -> None:
    runs.add("full")
    runs.add("mixed", artefact_prompts="oppu")
    mixed = next(g for g in group_runs(Run.load(f) for f in runs.folders) if not g.plain)
    assert variant(mixed) == "full, collective shift trained with oppu prompts"


def test_all_parts_of_the_evidence_in_one_report_keep_their_tables(runs: Runs) -> None:
    """A run on more collective users emptied Tables 11 and 14, and took an ablation's full run's place."""
    few = {"users": 12, "asked": "a12"}
    runs.add("methods/perfit", users=48, asked="a48", artefact="shipped")
    runs.add("ablations/full", collective_users=60, artefact="a60", **few)
    runs.add("ablations/stage2", ablation="stage2", modes="base personal", collective_rank=0, **few)
    for layer in (0, 1, 4):
        runs.add(f"layers/{layer}", layers=[layer], collective_users=60, artefact=f"l{layer}", **few)
    for count in (10, 219):
        runs.add(f"few/{count}", collective_users=count, artefact=f"n{count}", **few)
    for group in range(2):
        runs.add(f"groups/{group}", collective_group=group, artefact=f"g{group}", **few)
    runs.add("tasks/reply", artefact_task="reply", artefact="other", **few)
    groups = group_runs(Run.load(folder) for folder in runs.folders)
    (family,) = sweeps(groups)
    assert [group.layers for group in family] == [(0,), (1,), (4,), (2, 3)]
    (sizes,) = collective_sizes(groups)
    assert [group.collective_users for group in sizes] == [10, 60, 219]
    part = next(group for group in groups if group.ablation == "stage2")
    full = nearest(part, groups)
    assert full is not None and full.runs[0].folder.name == "full"
    assert [group.get("users") for group in main_groups(groups)] == [48]


def test_runs_at_two_rates_are_no_sweep(runs: Runs) -> None:
    """Three of them were a table of layers, with one name three times."""
    for rate in (1e-4, 1e-3, 1e-2):
        runs.add(f"r{rate}", learning_rate=rate)
    groups = group_runs(Run.load(folder) for folder in runs.folders)
    assert not sweeps(groups) and len(main_groups(groups)) == 3


def test_what_doubles_a_member_of_a_sweep_does_not_empty_it(runs: Runs) -> None:
    """As a shift trained again on another processor, or one run at a rate of its own."""
    for layer, rate in ((0, 1e-3), (1, 3e-3), (4, 1e-3)):
        runs.add(f"l{layer}", layers=[layer], learning_rate=rate)
    runs.add("again", layers=[1], learning_rate=3e-3, artefact="v1")
    runs.add("asked", layers=[1], learning_rate=1e-2)
    for count in (10, 60):
        runs.add(f"n{count}", collective_users=count, artefact=f"n{count}")
    runs.add("given", artefact="n60")
    groups = group_runs(Run.load(folder) for folder in runs.folders)
    (family,) = sweeps([group for group in groups if group.collective_users is None])
    assert [group.layers for group in family] == [(0,), (1,), (4,)]
    assert [group.collective_users for group in collective_sizes(groups)[0]] == [10, 60]


def test_runs_of_before_and_of_now_are_one_setting(runs: Runs) -> None:
    runs.add("before")
    runs.add("now", seed=1, artefact="v1", community_seeds=None)
    (group,) = group_runs(Run.load(folder) for folder in runs.folders)
    assert group.seeds == [0, 1]


def test_runs_measured_in_unlike_modes_make_a_report(runs: Runs) -> None:
    runs.add("full", 1.0, modes="base seed")
    runs.add("seed 1", 1.0, seed=1)
    runs.add("part", 1.5, ablation="stage2", modes="base personal", collective_rank=0)
    runs.add("lora", ablation="lora-p", modes="base personal")
    runs.add("lora 1", 2.0, ablation="lora-p", seed=1, modes="base collective")
    assert "Main results" in runs.report()


# -- the command -------------------------------------------------------------------------------


def test_command_prints_the_path(runs: Runs) -> None:
    runs.add("full")
    app = typer.Typer()
    app.command()(command)
    out = runs.root / "made" / "here"
    folder = str(runs.folders[0])
    result = CliRunner().invoke(app, [folder, folder + "/.", "--out", str(out)])  # the same run twice
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == str(out / "report.md")
    text = (out / "report.md").read_text("utf-8")
    assert "seed 0" in text
    assert str(runs.root.parent) not in text  # no path of this machine


def test_what_is_no_run_is_refused(runs: Runs) -> None:
    with pytest.raises(InvalidData, match="no finished run"):
        write_report([runs.root / "none"], runs.root / "report")
    with pytest.raises(InvalidInput, match="no runs"):
        write_report([], runs.root / "report")


def test_a_run_that_two_sweeps_have_counts_once(runs: Runs, caplog: pytest.LogCaptureFixture) -> None:
    runs.add("a")
    runs.add("copy")
    (group,) = group_runs(Run.load(f) for f in runs.folders)
    assert group.seeds == [0]
    assert "copy is the same run as" in caplog.text


# -- the paper ---------------------------------------------------------------------------------


def test_the_paper_s_figures_agree_with_each_other() -> None:
    assert set(paper.MAIN.figures) == {name for name, task in TASKS.items() if task.lamp}
    for task, measures in paper.ABLATION.figures.items():
        for measure, columns in measures.items():
            assert columns["full"] == paper.MAIN.get(task, measure, "perfit")
    assert paper.MAIN.get("movie_tagging", "loss", "perfit") is None


@pytest.mark.parametrize("task", paper.PARAMETERS.figures)
def test_the_paper_s_parameter_counts_are_those_of_its_presets(task: str) -> None:
    """Layers, ranks and the hidden size of Llama-2-7B (6.738e9 parameters) give the percentages."""
    from perfit_shared.presets import preset_for

    preset = preset_for(task)
    for name, rank in (("collective", preset.collective_rank), ("personal", preset.personal_rank)):
        percent = 100 * len(preset.paper_layers) * rank * 2 * 4096 / 6.738e9
        assert paper.PARAMETERS.get(task, "percent", name) == pytest.approx(percent, abs=6e-5)


def test_what_is_no_run_is_left_out_with_a_word(runs: Runs, caplog: pytest.LogCaptureFixture) -> None:
    """`runs/*` names files and other folders too; a run that is not finished is still refused."""
    runs.add("a")
    plain = runs.report()
    (runs.root / "notes.txt").write_text("x")
    runs.folders += [runs.root / "notes.txt", runs.root / "report"]
    assert runs.report() == plain
    assert {"notes.txt", "report"} == {record.message.split()[0] for record in caplog.records}
    (runs.root / "b").mkdir()
    (runs.root / "b" / "settings.json").write_text("{}")
    runs.folders.append(runs.root / "b")
    with pytest.raises(InvalidData, match="finished"):
        runs.report()
    with pytest.raises(InvalidData):
        write_report([runs.root / "notes.txt"], runs.root / "report")
