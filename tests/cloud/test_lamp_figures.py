"""`lamp figures`: a run without its texts says in reports and comparisons what the run said."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from tests.support.lamp_reports import Runs
from tests.support.lamp_runs import LABELS, RATINGS, TEXTS, query, save_run, simple_users, user
from typer.testing import CliRunner

from perfit_cloud.cli.lamp import app
from perfit_cloud.harness import RESULTS_FILE
from perfit_cloud.lamp.compare import Side, compare
from perfit_cloud.lamp.drift_results import drift_of
from perfit_cloud.lamp.results import QueryResult, Run, UserFolder, UserResult
from perfit_cloud.lamp.summary import summarise
from perfit_shared.errors import InvalidData, InvalidInput
from perfit_shared.tasks import Task

SECRET = "quokka"


def _texts() -> list[UserResult]:
    """Three people with two queries each; words of the golds are told apart."""
    made = []
    for name in ("ann", "bob", "cid"):
        answers = {"base": "a fox", "personal": f"the {SECRET} ran with {name}"}
        loss = {"base": 3.0, "personal": 1.0 + len(made) / 7}
        golds = (f"{SECRET} ran", f"{name} saw the {SECRET}")
        queries = [
            QueryResult(f"{name}-{at}", gold, 3, loss, answers, "mwow"[: len(gold.split())])
            for at, gold in enumerate(golds)
        ]
        made.append(user(name, queries))
    return made


def _plain_figures(run: Run) -> Mapping[str, Any]:
    """A summary without ids. Means over texts come from the libraries there, and from sums here."""
    summary = summarise(run)
    for one in summary["users"]:
        del one["user_id"]
    metrics = {
        name: {mode: pytest.approx(value, rel=1e-12) for mode, value in by_mode.items()}
        for name, by_mode in summary["metrics"].items()
    }
    return summary | {"metrics": metrics}


@pytest.mark.parametrize(
    ("task", "users"),
    [
        (TEXTS, _texts()),
        (LABELS, simple_users({"base": 2.0, "personal": 1.0})),
        (
            RATINGS,
            [
                user("ann", [query(1, "5", {"base": "4"}, {"base": 1.0})]),
                user("bob", [query(2, "1", {"base": "none"}, {"base": 2.0})]),
            ],
        ),
        (LABELS, simple_users({"base": 2.0, "personal": math.nan})),
    ],
    ids=["texts", "labels", "ratings", "diverged"],
)
def test_figures_say_what_the_run_said(tmp_path: Path, task: Task, users: list[UserResult]) -> None:
    run = save_run(tmp_path / "run", task, users)
    path = run.save_figures(tmp_path / "kept")
    kept = Run.load(tmp_path / "kept", texts=False)
    assert path == tmp_path / "kept" / "figures.json"
    assert (kept.modes, kept.users, kept.decoding) == (run.modes, (), run.decoding)
    theirs = summarise(kept)
    assert {one.pop("user_id") for one in theirs["users"]} == {""}
    assert theirs == _plain_figures(run)


def test_no_text_and_no_id_is_kept(tmp_path: Path) -> None:
    run = save_run(tmp_path / "run", TEXTS, _texts())
    text = run.save_figures(tmp_path / "kept").read_text("utf-8")
    words = {
        word for one in run.users for q in one.queries for word in (*q.gold.split(), *q.answers.values())
    }
    assert SECRET in words
    for word in (*words, *(one.user_id for one in run.users), *(q.id for u in run.users for q in u.queries)):
        assert f'"{word}' not in text and f"{word} " not in text, word


def test_a_report_of_figures_is_that_of_the_runs(tmp_path: Path) -> None:
    runs = Runs(tmp_path / "all")
    runs.add("perfit", 1.0)
    runs.add("rag", 1.4, method="rag", k=2, modes="base personal", layers=[], schedule=None)
    runs.add("oppu", 1.1, method="oppu", personal_parameters=4000, layers=[])
    save_run(tmp_path / "all" / "texts", TEXTS, _texts())
    runs.folders.append(tmp_path / "all" / "texts")
    kept = Runs(tmp_path / "kept" / "all")
    for folder in runs.folders:
        Run.load(folder).save_figures(kept.root / folder.name)
        kept.folders.append(kept.root / folder.name)
    whole = runs.report()
    people = whole.index("\n## Answers")  # the one section with texts, which figures cannot have
    end = whole.index("\n## ", people + 1) if "\n## " in whole[people + 1 :] else len(whole)
    report = kept.report()
    assert "No runs for:" in report and report.splitlines()[:12] == whole.splitlines()[:12]
    assert SECRET not in report
    ours = [line for line in (whole[:people] + whole[end:]).splitlines() if line.startswith("|")]
    assert [line for line in report.splitlines() if line.startswith("|")] == ours


def test_figures_are_compared_with_figures_and_with_runs(tmp_path: Path) -> None:
    losses = {"base": 3.0, "personal": 1.0}
    save_run(tmp_path / "good", LABELS, simple_users(losses, users=4))
    save_run(tmp_path / "bad", LABELS, simple_users(losses | {"personal": 1.5}, users=3, wrong=("personal",)))
    for name in ("good", "bad"):
        Run.load(tmp_path / name).save_figures(tmp_path / f"kept-{name}")
    sides = [str(tmp_path / name) for name in ("good", "bad", "kept-good", "kept-bad")]
    whole = compare(Side.parse(sides[0]), Side.parse(sides[1]))
    for one, two in ((2, 3), (0, 3), (2, 1)):
        found = compare(Side.parse(sides[one]), Side.parse(sides[two]))
        assert (found.users, found.queries, found.same_tokens) == (3, 6, True)
        assert found.unpaired == {"users": {"a": 1, "b": 0}, "queries": {"a": 0, "b": 0}}
        assert found.against["loss"].difference == pytest.approx(whole.against["loss"].difference)
        assert found.against["loss"].p == whole.against["loss"].p
        assert found.against["metrics"]["accuracy"] == whole.against["metrics"]["accuracy"]


def test_other_queries_are_nobody_s_pair(tmp_path: Path) -> None:
    """Figures cannot leave out a query of a user, so a user with one more is another."""
    users = simple_users({"personal": 1.0}, users=2)
    save_run(tmp_path / "run", LABELS, users).save_figures(tmp_path / "kept")
    more = [
        UserResult(u.user_id, 10, 5, (*u.queries, query(9, "a", {"personal": "a"}, {"personal": 1.0})))
        for u in users
    ]
    save_run(tmp_path / "more", LABELS, more)
    with pytest.raises(InvalidInput, match="share no user"):
        compare(Side.parse(str(tmp_path / "kept")), Side.parse(str(tmp_path / "more")))


def test_the_command(tmp_path: Path) -> None:
    run = save_run(tmp_path / "run", LABELS, simple_users({"base": 2.0, "personal": 1.0}))
    drift = {"tokens": [2], "base": [-1.0], "shared": {}}
    (run.folder / "drift.json").write_text(json.dumps(drift))
    for one in run.users:
        path = UserFolder(run.folder, one.user_id).path / "drift.json"
        path.write_text(json.dumps({"log_likelihoods": [-2.0], "same": [True]}))
    (run.folder / RESULTS_FILE).write_text('{"results": []}')
    result = CliRunner().invoke(app, ["figures", str(run.folder), "--out", str(tmp_path / "kept" / "run")])
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == str(tmp_path / "kept" / "run" / "figures.json")
    kept = Run.load(tmp_path / "kept" / "run", texts=False)
    assert drift_of(kept) == json.loads(json.dumps(drift_of(run)))
    assert (kept.folder / RESULTS_FILE).read_text() == '{"results": []}'


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: raw.pop("users"),
        lambda raw: raw.update(users=[]),
        lambda raw: raw.update(users=5),
        lambda raw: raw.update(format=9),
        lambda raw: raw["users"][0].pop("asked"),
        lambda raw: raw["users"][0]["modes"]["base"]["sums"].update(accuracy=["x"]),
        lambda raw: raw["users"][0].update(modes=[]),
        lambda raw: raw["users"][1]["modes"].pop("base"),
        lambda raw: raw["users"][1]["modes"]["base"]["sums"].update(accuracy=[1, 2, 3]),
        lambda raw: [one["sums"].update(accuracy=[1]) for u in raw["users"] for one in u["modes"].values()],
        lambda raw: [one["sums"].pop("macro_f1") for u in raw["users"] for one in u["modes"].values()],
        lambda raw: [u.update(modes={}) for u in raw["users"]],
        lambda raw: raw["users"][0].update(tokens=math.inf),
        lambda raw: raw.update(settings=[]),
        lambda raw: raw["settings"].update(seed="0"),
        lambda raw: raw["settings"].update(users="3"),
        lambda raw: raw["settings"].update(collective_rank=None),
        lambda raw: raw["settings"].update(decoding=None),
        lambda raw: raw["settings"].update(layers=["1"]),
        lambda raw: raw.update(seconds=None),
        lambda raw: raw["seconds"].update(fit="long"),
        lambda raw: raw.update(drift={"personal": {"nats": 0.1, "unchanged": 1.0, "prompts": 20}}),
    ],
)
def test_damaged_figures_are_refused(tmp_path: Path, damage: Any) -> None:
    run = save_run(tmp_path / "run", LABELS, simple_users({"base": 2.0, "personal": 1.0}))
    path = run.save_figures(tmp_path / "kept")
    raw = json.loads(path.read_text())
    damage(raw)
    path.write_text(json.dumps(raw))
    with pytest.raises(InvalidData, match="kept"):
        Run.load(tmp_path / "kept", texts=False)


def test_too_deep_a_file_is_damaged(tmp_path: Path) -> None:
    (tmp_path / "figures.json").write_text("[" * 100_000)
    with pytest.raises(InvalidData, match="damaged"):
        Run.load(tmp_path, texts=False)


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: raw.update(queries=[]),
        lambda raw: raw.update(steps="3"),
        lambda raw: raw["queries"][0]["loss"].update(base="2.0"),
        lambda raw: raw["queries"][0]["loss"].update(base=None),
        lambda raw: raw["queries"][0]["loss"].update(mine=1.0),
        lambda raw: raw["queries"][0]["answers"].pop("base"),
        lambda raw: raw["queries"][0]["answers"].update(base=5),
        lambda raw: raw["queries"][0].update(tokens=0),
        lambda raw: raw["queries"][0].update(origins=3),
    ],
)
def test_damaged_results_of_a_user_are_refused(tmp_path: Path, damage: Any) -> None:
    save_run(tmp_path, LABELS, simple_users({"base": 2.0, "personal": 1.0}))
    path = tmp_path / "users" / "u1" / "result.json"
    raw = json.loads(path.read_text())
    damage(raw)
    path.write_text(json.dumps(raw))
    with pytest.raises(InvalidData, match="u1"):
        Run.load(tmp_path)


def test_half_written_seconds_and_losses_are_refused(tmp_path: Path) -> None:
    folder = UserFolder(tmp_path, "u", "state")
    folder.save_state(b"", losses=[1.0], seconds=2.0)
    assert folder.losses == (1.0,) and folder.seconds["fit"] == 2.0
    (folder.path / "seconds.json").write_text('{"fit": ')
    (folder.path / "stage2.json").write_text('{"losses": [')
    with pytest.raises(InvalidData, match="seconds"):
        folder.seconds  # noqa: B018
    with pytest.raises(InvalidData, match="stage2"):
        folder.losses  # noqa: B018


def test_a_run_cut_short_while_modes_were_added_has_those_of_everybody(tmp_path: Path) -> None:
    """It could not be read any more: the first user had a mode that the others lacked."""
    both = simple_users({"base": 2.0, "personal": 1.0})
    some = simple_users({"base": 2.0})
    run = save_run(tmp_path, LABELS, [both[0], some[1], both[2]])
    assert run.modes == ("base",) and [*run.figures[0].modes] == ["base"]


def test_what_needs_texts_says_so(tmp_path: Path) -> None:
    save_run(tmp_path / "run", LABELS, simple_users({"base": 2.0})).save_figures(tmp_path / "kept")
    with pytest.raises(InvalidData, match="without its texts"):
        Run.load(tmp_path / "kept")
