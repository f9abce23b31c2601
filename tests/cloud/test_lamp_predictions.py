"""What a run answers, as LaMP's and OPPU's own scripts read it: from raw downloads to their metrics."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.support.lamp_files import WORDS, write_files
from tests.support.lamp_scripts import Refused, lamp_script, oppu_script

from perfit_cloud.lamp.prepare import find_questions, prepare_lamp
from perfit_cloud.lamp.request import LampRequest
from perfit_cloud.lamp.run import run_lamp
from perfit_cloud.model.base import BaseModel
from perfit_shared.errors import InvalidData
from perfit_shared.tasks import TASKS

LABELS = "user_top_100_history_label.json"
Run = Callable[..., Path]


@pytest.fixture
def run(base: BaseModel, tmp_path: Path) -> Run:
    """Answers of every user after a single step each; its folder."""

    def go(data: Path, task: str, **changes: Any) -> Path:
        values: dict[str, Any] = {
            "method": "perfit_stage2",
            "layers": (1,),
            "positions": "l2",
            "personal_rank": 1,
            "epochs": 1,
            "learning_rate": 1e-2,
            "batch_size": 64,
        }
        run_lamp(
            LampRequest(task=task, model="tiny", data=data, out=tmp_path / "out", **values | changes),
            base=base,
        )
        return tmp_path / "out"

    return go


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), "utf-8")


def download(folder: Path, kind: type, name: str, **more: Any) -> Path:
    """Six people's questions of movie tagging, ids of this type, and outputs of a task of this name."""
    ask = "among the following tags? tags: [comedy, action] description: "
    questions, golds = [], []
    for person in range(6):
        for at in range(2):
            profile = [
                {
                    "id": kind(f"{person}{at}{n}"),
                    "description": f"{WORDS[person]} {n}",
                    "tag": "comedy",
                    "date": f"2001-01-0{n + 1}",
                }
                for n in range(2 + at)
            ]
            question = {"id": kind(f"9{person}{at}"), "input": f"{ask}the {at}", "profile": profile}
            questions.append({**question, **({"user_id": kind(f"7{person}")} if "people" in more else {})})
            golds.append({"id": question["id"], "output": "action"})
    write(folder / "dev_questions.json", questions)
    write(folder / "dev_outputs.json", {"task": name, "golds": golds})
    return folder


@pytest.mark.parametrize("kind", [int, str])
@pytest.mark.parametrize(
    ("name", "script"), [("LaMP_2", lamp_script), ("LaMP_2M", oppu_script)], ids=["LaMP", "OPPU"]
)
def test_downloads_become_predictions_that_the_scripts_take(
    kind: type, name: str, script: Callable[..., dict[str, float]], run: Run, tmp_path: Path
) -> None:
    """Ids were written as text, and LaMP_2 as LaMP_2M, whose tags LaMP's script measures by overlap."""
    task, data = TASKS["movie_tagging"], tmp_path / "data"
    files = find_questions(download(tmp_path / "time", kind, name, people=True), print)
    prepare_lamp(files, task, data, users=3, least=1, force=False, notify=print)
    out = run(data, task.name)
    for labels in (data / LABELS, out / "golds.json"):
        for predictions in (out / "predictions.json", *(out / "predictions").iterdir()):
            assert script(labels, predictions).keys() == {"accuracy", "f1"}
        # Where every answer is right, so is the script's figure.
        assert script(labels, labels if script is lamp_script else with_model(labels))["accuracy"] == 1
    records = json.loads((data / "user_top_100_history.json").read_text())
    for record in records:
        ids = [record["user_id"], *(entry["id"] for part in ("profile", "query") for entry in record[part])]
        assert {type(name) for name in ids} == {kind}
    written = json.loads((data / LABELS).read_text())
    assert written["task"] == name and {type(gold["id"]) for gold in written["golds"]} == {kind}


def with_model(path: Path) -> Path:
    copy = path.with_name("right.json")
    write(copy, {**json.loads(path.read_text()), "model": "m"})
    return copy


def test_ids_of_the_label_file_count(run: Run, tmp_path: Path) -> None:
    """Here queries have texts and labels numbers; scripts read the labels."""
    data = write_files(tmp_path / "data")
    users = json.loads((data / "user_top_100_history.json").read_text())
    for query in (query for user in users for query in user["query"]):
        query["id"] = str(int(query["id"]))
    write(data / "user_top_100_history.json", users)
    relabelled(data, lambda golds: [{**gold, "id": int(gold["id"])} for gold in golds])
    out = run(data, "news_headline")
    assert set(lamp_script(data / LABELS, out / "predictions.json")) == {"rouge-1", "rouge-L"}


def relabelled(data: Path, change: Callable[[list[dict[str, Any]]], list[dict[str, Any]]]) -> Path:
    labels = json.loads((data / LABELS).read_text())
    write(data / LABELS, {**labels, "golds": change(labels["golds"])})
    return data


def test_golds_of_what_was_answered_lie_beside(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A part of the users, or a label file with more than theirs: scripts take golds.json alone."""
    extra = [{"id": "99999", "output": "of nobody"}]
    data = relabelled(write_files(tmp_path / "data"), lambda golds: golds + extra)
    out = run(data, "news_headline")
    with pytest.raises(Refused, match="ids"):
        lamp_script(data / LABELS, out / "predictions.json")
    assert "1 label belongs to no query; golds.json has those of the queries" in capsys.readouterr().err
    whole = oppu_script(out / "golds.json", out / "predictions.json")
    shutil.rmtree(out)
    run(data, "news_headline", users=2)
    few = json.loads((out / "golds.json").read_text())
    assert few["task"] == "LaMP_4" and len(few["golds"]) == 6
    assert oppu_script(out / "golds.json", out / "predictions.json").keys() == whole.keys()


def test_queries_that_cannot_be_asked_are_answered_by_nothing(run: Run, tmp_path: Path) -> None:
    data = write_files(tmp_path / "data")
    users = json.loads((data / "user_top_100_history.json").read_text())
    empty = users[1]["query"][0]
    empty["id"], empty["input"] = 70, "Generate a headline for the following article: "
    write(data / "user_top_100_history.json", users)
    old = json.loads((data / LABELS).read_text())["golds"]
    relabelled(data, lambda golds: [*({**g, "id": 70} if g == old[3] else g for g in golds)])
    out = run(data, "news_headline")
    for labels in (data / LABELS, out / "golds.json"):
        lamp_script(labels, out / "predictions.json")
    golds, answers = (
        {g["id"]: g["output"] for g in json.loads((out / name).read_text())["golds"]}
        for name in ("golds.json", "predictions.json")
    )
    assert answers[70] == "" and golds[70] == old[3]["output"]


def test_golds_that_are_no_label_are_said(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Macro-F1 is over the task's labels: where the data has others, it means nothing."""
    data = write_files(tmp_path / "data")
    labelled = {"answer": " {title}", "metric": "accuracy", "labels": ["cat", "dog"], "answer_tokens": 4}
    write(data / "task.json", {"template": "{text} so", **labelled})
    run(data, "news_headline", users=2)
    assert "6 of 6 golds are none of the 2 labels of news_headline" in capsys.readouterr().err


def test_outputs_of_two_tasks_are_refused(tmp_path: Path) -> None:
    folder = download(tmp_path / "time", str, "LaMP_2")
    for name in ("questions", "outputs"):
        (folder / f"dev_{name}.json").rename(folder / f"train_{name}.json")
    questions = [{"id": "1", "input": "tags: [a] description: b", "profile": []}]
    write(folder / "dev_questions.json", questions)
    write(folder / "dev_outputs.json", {"task": "LaMP_2M", "golds": [{"id": "1", "output": "action"}]})
    with pytest.raises(
        InvalidData, match=r"dev_outputs\.json: its task is LaMP_2M, an earlier file's LaMP_2$"
    ):
        prepare_lamp(
            find_questions(folder, print),
            TASKS["movie_tagging"],
            tmp_path / "data",
            users=3,
            least=1,
            force=False,
            notify=print,
        )


@pytest.mark.parametrize("ids", [(7, 7), (7, "7"), ("7", " 7")])
def test_an_id_that_comes_twice_is_refused(ids: tuple[Any, Any], run: Run, tmp_path: Path) -> None:
    """Numbers and texts alike: a folder of a user's files has but one name for both."""
    data = write_files(tmp_path / "data")
    users = json.loads((data / "user_top_100_history.json").read_text())
    for query, name in zip(users[0]["query"], ids, strict=False):
        query.update(id=name, gold="the cat")
    write(data / "user_top_100_history.json", users)
    with pytest.raises(InvalidData, match="user 12: query 7: another query of the file has this id"):
        run(data, "news_headline")
