"""The demo: its people, what it promises, and the whole of it on a tiny random model."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import demo
from demo_pages import page, result_lines
from perfit_shared.tasks import Task

ROOT = Path(__file__).resolve().parents[2]
EVERYBODY = [(name, person) for person in demo.CAST for name in (person.name, person.other)]


def texts(name: str, person: demo.Person) -> list[str]:
    return [row[person.gold] for row in demo.rows_of(name, person.task)]


@pytest.mark.parametrize(("name", "person"), EVERYBODY, ids=lambda value: str(value)[:6])
def test_nobody_repeats_themselves(name: str, person: demo.Person) -> None:
    """So the test part, the last rows, shares nothing with what came before either."""
    rows = demo.rows_of(name, person.task)
    for field in (person.asks, person.gold):
        plain = {re.sub(r"\W+", " ", row[field].lower()).strip() for row in rows}
        assert len(plain) == len(rows)
    parts = [row.get("part", "") for row in rows]
    if name == person.name:
        assert parts == [""] * 100 + ["test"] * 20
    else:
        assert len(rows) >= 60
        assert not any(parts)


@pytest.mark.parametrize("person", demo.CAST, ids=lambda person: person.name)
def test_no_word_is_in_over_30_percent_of_what_they_wrote(person: demo.Person) -> None:
    written = texts(person.name, person)
    counts: Counter[str] = Counter()
    for text in written:
        counts.update(set(re.findall(r"[\w'&]+", text.lower())))
        words = text.lower().split()
        counts.update(
            {" ".join(words[:n]) + " …" for n in (2, 3)} | {"… " + " ".join(words[-n:]) for n in (1, 2, 3)}
        )
    word, most = counts.most_common(1)[0]
    assert most <= 0.3 * len(written), word


@pytest.mark.brief
def test_no_commit_of_the_data_is_in_the_people(brief: Path) -> None:
    folder = brief / "data" / "commits"
    files = ("user_others.json", "user_top_100_history.json")
    people = [user for name in files for user in json.loads((folder / name).read_text())]
    known = {row[key] for user in people for row in user["profile"] for key in ("changes", "message")}
    commits = demo.CAST[1]
    for name in (commits.name, commits.other):
        assert not known & {text for row in demo.rows_of(name, commits.task) for text in row.values()}


def person(name: str = "nell", **changes: Any) -> dict[str, Any]:
    """Figures of a demo that shows all that it should."""
    figures = {"base": 5.0, "collective": 4.8, "seed": 4.0, "personal": 2.9, "other": 4.5}
    overlap = {"base": 0.05, "collective": 0.06, "seed": 0.1, "personal": 0.2, "other": 0.08}
    answer = {"asked": "Are you *in*?", "gold": "yes.. in", **dict.fromkeys(figures, "no")}
    whole = {
        "name": name,
        "task": "reply",
        "other": "desmond",
        "loss": figures,
        "metric": {"name": "rouge_1", **overlap},
        "rouge_l": overlap,
        "best_constant_affix": 0.15,
        "examples": 20,
        "answers": [answer] * 20,
        "update_seconds": 70.0,
        "evaluate_seconds": 30.0,
        "bytes_up": 12_000_000,
        "bytes_down": 11_000_000,
    }
    return whole | changes


@pytest.mark.parametrize(
    ("changes", "broken", "weak"),
    [
        ({}, [], []),
        ({"loss": person()["loss"] | {"personal": 3.01}}, ["25 %"], []),
        ({"loss": person()["loss"] | {"other": 2.9}}, ["higher loss"], []),
        ({"metric": person()["metric"] | {"seed": 0.2}}, [], ["ROUGE-1 of personal is not above seed"]),
        ({"rouge_l": person()["rouge_l"] | {"other": 0.3}}, [], ["ROUGE-L of personal is not above other"]),
        ({"best_constant_affix": 0.2}, [], ["constant affix"]),
    ],
)
def test_what_the_demo_must_show(changes: dict[str, Any], broken: list[str], weak: list[str]) -> None:
    people = [person(**changes)]
    for expected, found in ((broken, demo.broken(people)), (weak, demo.weak(people))):
        assert len(found) == len(expected)
        assert all(part in line for part, line in zip(expected, found, strict=True))


def test_pages_have_every_answer() -> None:
    written = page([person(), person("joris")], 300.0, "2 cores")
    assert written.count("- personal: no") == 40
    assert r"Are you \*in\*?" in written
    assert len(result_lines(person())) <= 20


@pytest.fixture(scope="module")
def artefacts(load: Any, make_artefact: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from dataclasses import replace

    folder = tmp_path_factory.mktemp("artefacts")
    for one in demo.CAST:
        made = make_artefact(load("llama"), one.task, layers=(0, 1, 2), positions="l3")
        task = Task(one.task, f"{{{one.asks}}} so", f" {{{one.gold}}}", "rouge_1", answer_tokens=8)
        replace(made, task=task).save(folder / one.task)
    return folder


@pytest.mark.slow  # some thirty commands, about 50 s of CPU
def test_the_whole_demo_on_a_tiny_model(
    model_folder: Callable[[str], Path], artefacts: Path, tmp_path: Path
) -> None:
    """Random answers overlap with nothing, so it misses what it should show, and says so."""
    command = [sys.executable, str(ROOT / "scripts" / "demo.py"), "--model", str(model_folder("llama"))]
    command += ["--artefacts", str(artefacts), "--epochs", "3", "--run", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "short of what the demo should show: nell: " in done.stdout
    assert len([line for line in done.stdout.splitlines() if "short of" not in line]) < 80
    result = json.loads((tmp_path / "result.json").read_text())
    assert [p["name"] for p in result["people"]] == ["nell", "joris"]
    for p in result["people"]:
        assert set(p["loss"]) == set(p["rouge_l"]) == set(demo.MODES)
        assert p["loss"]["personal"] < p["loss"]["other"]
        keys = {
            "metric",
            "update_seconds",
            "bytes_up",
            "bytes_down",
            "examples",
            "article",
            "before",
            "after",
        }
        assert keys | {"gold", "best_constant_affix"} <= set(p)
        assert p["gold"] in done.stdout

    # What it prints last works afterwards: the same cloud and devices, once more.
    assert done.stdout.rstrip().endswith("make talk WHO=joris")
    said = subprocess.run(
        [*command, "talk", "nell", "the cat sat"], capture_output=True, text=True, check=True
    )
    assert [line.split()[0] for line in said.stdout.splitlines()[2:]] == ["model", "Nell"]
    empty = [*command[:-1], str(tmp_path / "nothing"), "talk", "nell", "the cat sat"]
    said = subprocess.run(empty, capture_output=True, text=True, check=False)
    assert (said.returncode, said.stdout) == (1, "nobody has learned anything yet; run `make demo` first\n")
