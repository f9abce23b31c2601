"""`perfit-cloud lamp compare`: pairing, and what it prints."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer
from tests.support.lamp_runs import LABELS, RATINGS, query, save_run, simple_users, user
from typer.testing import CliRunner, Result

from perfit_cloud.cli.lamp.compare import compare as command
from perfit_cloud.lamp.compare import Side, compare
from perfit_shared.errors import InvalidData, InvalidInput
from perfit_shared.prompts import with_prompts
from perfit_shared.tasks import TASKS


def _run(*arguments: str) -> Result:
    app = typer.Typer()
    app.command()(command)
    return CliRunner().invoke(app, arguments)


@pytest.fixture
def runs(tmp_path: Path) -> tuple[str, str]:
    """The second's personal loss is 0.5 higher for every one of four users, and its answers are wrong."""
    losses = {"base": 3.0, "collective": 2.0, "personal": 1.0}
    save_run(tmp_path / "good", LABELS, simple_users(losses, users=4))
    worse = simple_users(losses | {"personal": 1.5}, users=4, wrong=("base", "personal"))
    save_run(tmp_path / "bad", LABELS, worse)
    return str(tmp_path / "good"), str(tmp_path / "bad")


def test_differences_by_hand(runs: tuple[str, str]) -> None:
    found = compare(Side.parse(runs[0]), Side.parse(runs[1])).against
    loss, accuracy = found["loss"], found["metrics"]["accuracy"]
    assert (loss.a, loss.b) == (pytest.approx(1.15), pytest.approx(1.65))  # the users' 1, 1.1, 1.2, 1.3
    assert loss.difference == pytest.approx(-0.5)
    assert loss.interval == pytest.approx((-0.5, -0.5))
    assert loss.p == pytest.approx(2 / 16)
    assert (accuracy.a, accuracy.b, accuracy.difference) == (1, 0, 1)
    assert (accuracy.better, accuracy.worse, accuracy.of) == (4, 0, 4)
    back = compare(Side.parse(runs[1]), Side.parse(runs[0])).against["loss"]
    assert (back.difference, back.better, back.worse) == (pytest.approx(0.5), 0, 4)


def test_modes_of_one_run(runs: tuple[str, str]) -> None:
    found = compare(Side.parse(runs[0] + ":personal"), Side.parse(runs[0] + ":collective"))
    assert found.against["loss"].difference == pytest.approx(-1)
    assert (found.users, found.queries, found.same_tokens) == (4, 8, True)


def test_table_and_json(runs: tuple[str, str]) -> None:
    result = _run(*runs)
    assert result.exit_code == 0
    assert result.stderr == ""
    lines = result.stdout.splitlines()
    assert "4 users, 8 queries" in lines[0]
    assert lines[1].split()[:3] == ["A", "B", "A"]
    loss = next(line for line in lines if line.startswith("loss"))
    assert loss.split("  ")[-1].strip() == "0 of 4"
    for text in ("1.1500", "1.6500", "-0.5000", "[-0.5000, -0.5000]", "0.1250", "4 of 4"):
        assert text in loss
    assert [line.split(" (")[0] for line in lines[3:]] == ["accuracy", "macro_f1"] * 2

    value = json.loads(_run(*runs, "--json").stdout)
    assert list(value) == [
        "task",
        "a",
        "b",
        "users",
        "queries",
        "unpaired",
        "same_tokens",
        "differing",
        "loss",
        "metrics",
        "mean_over_users",
    ]
    assert value["b"] == {"run": runs[1], "mode": "personal"}
    assert value["loss"]["difference"] == pytest.approx(-0.5)
    assert set(value["loss"]) == {"a", "b", "difference", "interval", "p", "better", "worse", "of"}


def test_prompts_and_decoding_that_differ_are_said(tmp_path: Path) -> None:
    users = simple_users({"personal": 1.0})
    oppu = with_prompts(TASKS[LABELS.name], "oppu")
    drawn = {"temperature": 0.1, "top_k": 10, "top_p": 0.9}
    for name, task, penalty in (("a", oppu, 0.0), ("b", replace(oppu, stop=("\n",), answer_tokens=12), 0.4)):
        save_run(tmp_path / name, task, users, decoding=drawn, frequency_penalty=penalty)
    a, b = (str(tmp_path / name) for name in "ab")
    drawing = "temperature 0.1, top-k 10, top-p 0.9"
    other = f'{drawing}, frequency penalty 0.4, up to 12 tokens, to "\\n"'
    both = f"{drawing}, up to 200 tokens, no stop; {other}"
    assert _run(a, b).stderr.splitlines() == [
        "perfit-cloud: the two runs differ in prompts (oppu; task), which their answers follow as well",
        f"perfit-cloud: the two runs differ in decoding ({both}), which their answers follow as well",
    ]
    assert list(json.loads(_run(a, b, "--json").stdout)["differing"]) == ["prompts", "decoding"]
    assert not _run(a, f"{a}:personal").stderr


def test_what_does_not_pair_is_left_out_and_told(tmp_path: Path) -> None:
    users = simple_users({"personal": 1.0}, users=3)
    shorter = replace(users[0], queries=users[0].queries[1:])
    save_run(tmp_path / "a", LABELS, users)
    longer = replace(
        users[1], queries=(query(9, "a", {"personal": "c"}, {"personal": 9.0}), *users[1].queries)
    )
    save_run(tmp_path / "b", LABELS, [longer, shorter, user("new", users[2].queries)])
    found = compare(Side.parse(str(tmp_path / "a")), Side.parse(str(tmp_path / "b")))
    assert (found.users, found.queries) == (2, 3)
    assert found.unpaired == {"users": {"a": 1, "b": 1}, "queries": {"a": 1, "b": 1}}
    assert found.against["loss"].difference == 0
    result = _run(str(tmp_path / "a"), str(tmp_path / "b"))
    assert f"1 users only in {tmp_path / 'a'}:personal, left out" in result.stderr
    assert f"1 queries only in {tmp_path / 'a'}:personal" in result.stderr
    assert f"1 users only in {tmp_path / 'b'}" in result.stderr


def test_queries_pair_by_id_whatever_their_order(tmp_path: Path) -> None:
    queries = [query(at, gold, {"personal": gold}, {"personal": float(at)}) for at, gold in enumerate("abc")]
    save_run(tmp_path / "a", LABELS, [user("u", queries)])
    save_run(tmp_path / "b", LABELS, [user("u", queries[::-1])])
    found = compare(Side.parse(str(tmp_path / "a")), Side.parse(str(tmp_path / "b")))
    assert found.against["metrics"]["accuracy"].b == 1
    assert found.same_tokens


def test_other_tokens_are_told(tmp_path: Path) -> None:
    for name, tokens in (("a", 2), ("b", 3)):
        users = [user("u", [query(1, "a", {"personal": "a"}, {"personal": 1.0}, tokens)])]
        save_run(tmp_path / name, LABELS, users)
    assert "different tokens" in _run(str(tmp_path / "a"), str(tmp_path / "b")).stderr


def _no_mode(folder: Path) -> Any:
    save_run(folder / "a", LABELS, simple_users({"base": 1.0}))
    return folder / "a", "a", InvalidInput, "did not measure personal; it has base"


def _odd_mode(folder: Path) -> Any:
    save_run(folder / "a", LABELS, simple_users({"personal": 1.0}))
    return f"{folder / 'a'}:persnal", "a", InvalidInput, 'no mode "persnal"'


def _no_run(folder: Path) -> Any:
    return folder / "none", "a", InvalidData, "no finished run"


def _other_task(folder: Path) -> Any:
    ratings = [user("u0", [query(0, "3", {"personal": "3"}, {"personal": 1.0})])]
    save_run(folder / "a", LABELS, simple_users({"personal": 1.0}))
    save_run(folder / "b", RATINGS, ratings)
    return folder / "a", "b", InvalidInput, "one task"


def _other_labels(folder: Path) -> Any:
    save_run(folder / "a", LABELS, simple_users({"personal": 1.0}))
    save_run(folder / "b", replace(LABELS, labels=("a", "b")), simple_users({"personal": 1.0}))
    return folder / "a", "b", InvalidInput, "metric or labels"


def _strangers(folder: Path) -> Any:
    users = simple_users({"personal": 1.0})
    save_run(folder / "a", LABELS, users[:1])
    save_run(folder / "b", LABELS, users[1:])
    return folder / "a", "b", InvalidInput, "share no user"


def _other_golds(folder: Path) -> Any:
    for name, gold in (("a", "a"), ("b", "b")):
        users = [user("u", [query(1, gold, {"personal": "a"}, {"personal": 1.0})])]
        save_run(folder / name, LABELS, users)
    return folder / "a", "b", InvalidData, "query 1 of user u has different golds"


@pytest.mark.parametrize(
    "make", [_no_mode, _odd_mode, _no_run, _other_task, _other_labels, _strangers, _other_golds]
)
def test_what_cannot_be_compared_says_why(make: Any, tmp_path: Path) -> None:
    one, two, error, text = make(tmp_path)
    with pytest.raises(error, match=text):
        compare(Side.parse(str(one)), Side.parse(str(tmp_path / two)))
