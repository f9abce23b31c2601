"""Tasks of an operator's own, text or chat turns, through stage 1 and a LaMP run."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.support.chat_templates import chat_base

from perfit_cloud.collective.run import CollectiveRequest, train_collective
from perfit_cloud.lamp.compare import Side, compare
from perfit_cloud.lamp.report import write_report
from perfit_cloud.lamp.request import LampRequest
from perfit_cloud.lamp.results import Run
from perfit_cloud.lamp.run import run_lamp
from perfit_cloud.model.artefacts import Artefact
from perfit_cloud.model.base import BaseModel
from perfit_shared.errors import InvalidData, NotFound
from perfit_shared.tasks import TASKS, load_task

GUIDE = Path(__file__).parents[2] / "docs" / "tasks.md"
BLOCKS = re.findall(r"```json\n(.*?)```", GUIDE.read_text("utf-8"), re.DOTALL)
SMALL: dict[str, Any] = {
    "layers": (1,),
    "positions": "l2",
    "collective_rank": 2,
    "personal_rank": 1,
    "batch_size": 4,
    "epochs": 1,
    "learning_rate": 5e-3,
}


@pytest.fixture(scope="module")
def spoken(model_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    """A tiny model with a chat template."""
    return chat_base(model_folder("llama"), "chatml", tmp_path_factory.mktemp("spoken"))


def tickets(folder: Path, **changes: Any) -> Path:
    """The guide's task, with examples in the form of OPPU's files."""
    folder.mkdir()
    (folder / "task.json").write_text(json.dumps(json.loads(BLOCKS[0]) | {"answer_tokens": 4} | changes))

    def item(user: int, n: int) -> dict[str, str]:
        return {"ticket": f"the cat {n} sat", "product": f"mat {user}", "answer": f"on the mat {n}"}

    def query(user: int, n: int) -> dict[str, str]:
        asked = item(user, n)
        return {"id": f"{user}-{n}", "gold": asked.pop("answer"), **asked}

    users = [
        {
            "user_id": str(user),
            "profile": [{"id": str(n), **item(user, n)} for n in range(6)],
            "query": [query(user, n) for n in (7, 8)],
        }
        for user in range(4)
    ]
    (folder / "user_others.json").write_text(json.dumps(users))
    (folder / "user_top_100_history.json").write_text(json.dumps(users[:2]))
    return folder


def trained(data: Path, base: BaseModel, out: Path, **changes: Any) -> Artefact:
    small = {**SMALL, "device_epochs": 1, "device_learning_rate": 5e-3}
    request = CollectiveRequest(
        **{"task": None, "data": data, "model": "tiny", "out": out, **small, **changes}
    )
    return train_collective(request, base=base)


def ran(data: Path, base: BaseModel, out: Path, **changes: Any) -> Run:
    given = {"task": None, "model": "tiny", "data": data, "out": out}
    return run_lamp(LampRequest(**{**given, **SMALL, **changes}), base=base)


def test_the_guide_s_example_is_trained_and_read_as_the_model_reads(
    load: Callable[[str], BaseModel], spoken: BaseModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "tickets"
    folder.mkdir()
    (folder / "task.json").write_text(BLOCKS[0])
    lines = [json.loads(line) for line in BLOCKS[1].splitlines()]
    (folder / "all.jsonl").write_text("\n".join(json.dumps(line) for line in lines * 4))
    task = load_task(folder)
    as_turns = trained(folder, spoken, tmp_path / "turns")
    assert "reads tasks as chat turns: the model has a chat template" in capsys.readouterr().err
    as_text = trained(folder, load("llama"), tmp_path / "text")
    assert "reads tasks as text: the model has no chat template" in capsys.readouterr().err
    assert (as_turns.name, as_turns.task) == ("support_ticket", task.resolved(True))
    assert as_text.task == task.resolved(False)
    assert Artefact.load(tmp_path / "turns").task == as_turns.task
    assert trained(folder, spoken, tmp_path / "no", chat="no").task == as_text.task
    assert as_turns.task.read_as(as_turns.task.prompt(lines[0])) == [
        ("system", "You answer tickets in your colleague's own way."),
        ("user", "Answer this ticket: The page stays white.\nIt is about Web."),
    ]


def test_an_artefact_s_own_task_is_run_and_what_differs_is_said(
    spoken: BaseModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    artefact = trained(tickets(tmp_path / "data"), spoken, tmp_path / "artefact")
    other = tickets(
        tmp_path / "other", template="{ticket} {product}", chat=False, system="", chat_template=""
    )
    spec = dict.fromkeys(("layers", "positions", "collective_rank", "personal_rank"))
    run = ran(other, spoken, tmp_path / "run", artefact=tmp_path / "artefact", **spec)
    said = capsys.readouterr().err
    assert "the artefact's task is run; " in said
    assert "task.json differs in template, answer, chat, system, chat_template\n" in said
    assert (run.task, run.settings["chat"], run.prompts) == (artefact.task, True, "task")
    assert set(run.summary()["metrics"]) == {"rouge_1", "rouge_l"}
    ran(tmp_path / "data", spoken, tmp_path / "same", artefact=tmp_path / "artefact", **spec)
    assert "differs in" not in capsys.readouterr().err, "it is the file that the artefact was trained with"
    # What is asked for by name counts; without an artefact, the folder's file does.
    asked = ran(other, spoken, tmp_path / "asked", artefact=tmp_path / "artefact", prompts="task", **spec)
    assert asked.task == load_task(other) and "was trained with other prompts" in capsys.readouterr().err
    alone = ran(other, spoken, tmp_path / "alone", method="perfit_stage2")
    assert alone.task == load_task(other)


@pytest.mark.slow
def test_reports_and_comparisons_of_a_task_that_the_paper_lacks(spoken: BaseModel, tmp_path: Path) -> None:
    data = tickets(tmp_path / "data")
    runs = [ran(data, spoken, tmp_path / name, seed=seed) for seed, name in enumerate("ab")]
    write_report([run.folder for run in runs], tmp_path / "report")
    report = (tmp_path / "report" / "report.md").read_text("utf-8")
    assert "support_ticket" in report and "task prompts as chat turns, paper schedule" in report
    sides = [Side(run, "personal") for run in runs]
    compared = compare(*sides)
    assert compared.to_json()["task"] == "support_ticket" and not compared.differing
    as_text = ran(data, spoken, tmp_path / "text", method="perfit_stage2", chat="no")
    differing = compare(sides[0], Side(as_text, "personal")).differing
    assert differing["reading"] == ("chat turns", "text")


def test_a_built_in_task_follows_the_model_and_the_paper_s_prompts_do_not(
    spoken: BaseModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """LaMP's instruction as the user's turn lacks the cue; OPPU's and LaMP's by name are texts."""
    (tmp_path / "a.jsonl").write_text(
        "\n".join(json.dumps({"user_id": n % 2, "text": f"cat {n}", "title": f"dog {n}"}) for n in range(8))
    )

    def task(name: str, **changes: Any) -> Any:
        return trained(tmp_path / "a.jsonl", spoken, tmp_path / name, task="news_headline", **changes).task

    headline = TASKS["news_headline"]
    assert task("default") == headline.resolved(True)
    assert task("lamp", prompts="lamp") == headline.resolved(False)
    assert "reads tasks as text: --prompts lamp" in capsys.readouterr().err
    assert (
        task("oppu", prompts="oppu").template
        == "Generate a headline for the following article: {text}\n headline:"
    )
    assert task("both", prompts="oppu", chat="auto").answer == "{title}"


def test_what_a_task_of_one_s_own_lacks_is_one_error(tmp_path: Path) -> None:
    path = tmp_path / "task.json"
    with pytest.raises(NotFound, match="say which task with --task NAME"):
        load_task(tmp_path)
    for wrong, says in (
        ({"task": "tickets", "template": "{a}"}, "it also needs answer, metric"),
        ({"template": "{a}", "answer": "{b}", "metric": "mae"}, 'add "task": "NAME"'),
        ({"task": 5}, "its task is no text"),
        ({"task": "tickets", "colour": 1, "name": 2}, "unknown keys: colour, name"),
        ({"task": "Tickets!", "template": "{a}", "answer": "{b}", "metric": "mae"}, "lower-case letters"),
        (
            {"task": "tickets", "template": "{a}", "answer": "{b}", "metric": "bleu"},
            'no metric "bleu"; there are',
        ),
        ({"task": "chat", "chat": False, "system": "x"}, "need chat: true"),
    ):
        path.write_text(json.dumps(wrong))
        with pytest.raises(InvalidData, match=re.escape(says)) as error:
            load_task(tmp_path)
        assert str(path) in str(error.value)
    with pytest.raises(InvalidData, match='for another task, "chat"'):
        load_task(tmp_path, "reply")


def test_a_query_of_several_fields_lacks_one(spoken: BaseModel, tmp_path: Path) -> None:
    data = tickets(tmp_path / "data")
    file = data / "user_top_100_history.json"
    users = json.loads(file.read_text())
    del users[0]["query"][0]["product"]
    file.write_text(json.dumps(users))
    with pytest.raises(InvalidData, match='query 0-7: field "product" is missing'):
        ran(data, spoken, tmp_path / "out", method="perfit_stage2")


def test_an_artefact_says_how_its_task_is_read(
    make_artefact: Callable[..., Artefact], load: Callable[[str], BaseModel], tmp_path: Path
) -> None:
    with pytest.raises(InvalidData, match="should be true or false"):
        replace(make_artefact(load("llama")), task=TASKS["news_headline"])


@pytest.mark.brief
def test_the_brief_s_commits_are_read_with_either_wording(brief: Path, spoken: BaseModel) -> None:
    from perfit_shared.lamp import read_users

    folder = brief / "data" / "commits"
    own, built_in = load_task(folder), TASKS["commit_message"]
    assert own.resolved(False).template == built_in.resolved(False).template
    for task in (own, built_in.resolved(True)):
        user = read_users(folder / "user_top_100_history.json", task).users[0]
        assert set(user.profile[0].item) == set(user.query[0].item) == {"changes", "message"}
