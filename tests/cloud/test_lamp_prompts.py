"""A LaMP run asks with the prompts it is told, trains by the schedule it is told, and says both."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.support.lamp_files import TASK, write_files

from perfit_cloud.collective.encoding import Encoder
from perfit_cloud.lamp.measure import Decoding
from perfit_cloud.lamp.people import Learner, read_people
from perfit_cloud.lamp.request import LampRequest
from perfit_cloud.lamp.results import Run
from perfit_cloud.lamp.run import run_lamp
from perfit_cloud.model.artefacts import Artefact
from perfit_cloud.model.base import BaseModel
from perfit_shared.errors import InvalidInput
from perfit_shared.prompts import with_prompts
from perfit_shared.tasks import TASKS, Task, load_task


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_files(tmp_path_factory.mktemp("lamp"))


@pytest.fixture
def request_for(data: Path, tmp_path: Path) -> Callable[..., LampRequest]:
    def make(**changes: Any) -> LampRequest:
        values: dict[str, Any] = {
            "task": TASK,
            "model": "tiny",
            "data": data,
            "out": tmp_path / "out",
            "layers": (1,),
            "positions": "l2",
            "collective_rank": 2,
            "personal_rank": 1,
            "batch_size": 4,
            "epochs": 2,
            "learning_rate": 1e-2,
            "users": 2,
        }
        return LampRequest(**(values | changes))

    return make


ALONE = {"method": "perfit_stage2"}
STAGE_1 = {"collective_epochs": 1, "collective_learning_rate": 5e-3}


@pytest.mark.slow
def test_oppu_s_prompts_reach_both_stages_and_the_answers(
    request_for: Callable[..., LampRequest], base: BaseModel, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_lamp(request_for(prompts="oppu", **STAGE_1), base=base)
    oppu = with_prompts(TASKS[TASK], "oppu").resolved(False)
    assert run.task == oppu and run.prompts == "oppu"
    assert Artefact.load(run.folder / "artefact").task == oppu
    said = capsys.readouterr().err
    assert "layers 1 of 4 (as given)" in said and "256 tokens with the answer; oppu prompts" in said
    # Without a stop, a random model goes on for 200 tokens; with task.json's, for 6.
    answers = [text for user in run.users for query in user.queries for text in query.answers.values()]
    assert max(len(base.encode(text)) for text in answers) > 60
    settings = json.loads((run.folder / "settings.json").read_text())
    assert {k: settings[k] for k in ("prompts", "answer_tokens", "stop", "token_cap", "schedule")} == {
        "prompts": "oppu",
        "answer_tokens": 200,
        "stop": [],
        "token_cap": 256,
        "schedule": "paper",
    }
    with pytest.raises(InvalidInput, match=r"holds a run with other .*prompts.*; use another --out"):
        run_lamp(request_for(prompts="lamp", **STAGE_1), base=base)


def test_without_a_wish_task_json_s_prompts_are_asked(
    request_for: Callable[..., LampRequest], base: BaseModel, tmp_path: Path, data: Path
) -> None:
    run = run_lamp(request_for(**ALONE), base=base)
    assert run.prompts == "task" and run.task == load_task(data, TASK).resolved(False)
    again = run_lamp(request_for(prompts="task", **ALONE), base=base)
    assert again.users == run.users
    bare = tmp_path / "bare"
    shutil.copytree(data, bare)
    (bare / "task.json").unlink()
    run = run_lamp(request_for(data=bare, out=tmp_path / "other", **ALONE), base=base)
    assert run.prompts == "lamp" and run.task == TASKS[TASK].resolved(False)
    with pytest.raises(InvalidInput, match=r"holds no task\.json"):
        run_lamp(request_for(data=bare, prompts="task", **ALONE), base=base)


def test_a_penalty_that_is_asked_for_takes_the_task_s_place(
    request_for: Callable[..., LampRequest], base: BaseModel, tmp_path: Path, data: Path
) -> None:
    repeats = replace(load_task(data, TASK).resolved(False), stop=(), answer_tokens=40)
    asked = {"method": "none", "decoding": Decoding(temperature=0.0)}

    def answers(name: str, **changes: Any) -> list[str]:
        request = request_for(out=tmp_path / name, **asked, **changes)
        run = run_lamp(request, base=base, task=replace(repeats, frequency_penalty=2.0))
        return [query.answers["base"] for user in run.users for query in user.queries]

    assert answers("the task's") == answers("2", frequency_penalty=2.0)
    without = answers("none", frequency_penalty=0.0)
    assert without != answers("2", frequency_penalty=2.0)
    assert Run.load(tmp_path / "none").settings["frequency_penalty"] == 0.0


@pytest.mark.slow
def test_an_artefact_of_other_prompts_is_used_and_said(
    request_for: Callable[..., LampRequest],
    base: BaseModel,
    make_artefact: Callable[..., Artefact],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    made = replace(make_artefact(base), task=TASKS[TASK].resolved(False))
    made.save(tmp_path / "artefact")
    spec = dict.fromkeys(("layers", "positions", "collective_rank", "personal_rank"))
    run = run_lamp(request_for(artefact=tmp_path / "artefact", prompts="oppu", users=1, **spec), base=base)
    assert "was trained with other prompts (lamp) than are asked here (oppu)" in capsys.readouterr().err
    assert (run.settings["artefact_prompts"], run.prompts) == ("lamp", "oppu")


@pytest.mark.slow
def test_the_paper_s_schedule_and_a_device_s(
    request_for: Callable[..., LampRequest],
    base: BaseModel,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Histories of 24, 9, 16 and 5: 4 epochs of 16 a batch (Table 9), or what each of four devices does."""
    request = request_for(out=tmp_path / "paper", epochs=None, batch_size=None, users=4, **ALONE)
    paper = run_lamp(request, base=base)
    assert [user.steps for user in paper.users] == [8, 4, 4, 4]
    device = run_lamp(replace(request, out=tmp_path / "device", schedule="device"), base=base)
    # In folds, 4 a batch: 75 steps or a few more, one may end early; with 5 examples there is no update.
    steps = [user.steps for user in device.users]
    assert steps[0] == 78 and 0 < steps[1] <= 75 <= steps[2] <= 78 and steps[3] == 0
    assert "stage 2 by the device schedule: 75 to 78 steps a user" in capsys.readouterr().err
    last = device.users[-1]
    assert last.loss("personal") == last.loss("base") != paper.users[-1].loss("personal")
    summaries = [json.loads((run.folder / "summary.json").read_text()) for run in (paper, device)]
    assert [summary["settings"]["schedule"] for summary in summaries] == ["paper", "device"]
    assert [user["steps"] for user in summaries[1]["users"]] == steps
    with pytest.raises(InvalidInput, match="other rate growth, schedule"):
        run_lamp(replace(request, schedule="device"), base=base)
    with pytest.raises(InvalidInput, match='no schedule "mine"; there are device, paper'):
        request_for(schedule="mine", **ALONE)


def test_a_device_s_epochs_as_asked(request_for: Callable[..., LampRequest], base: BaseModel) -> None:
    run = run_lamp(request_for(schedule="device", batch_size=None, **ALONE), base=base)
    assert [user.steps for user in run.users] == [12, 6]
    assert run.settings["asked_epochs"] == 2


@pytest.mark.slow
def test_the_paper_s_figures_stand_whatever_an_artefact_says(
    request_for: Callable[..., LampRequest],
    base: BaseModel,
    make_artefact: Callable[..., Artefact],
    tmp_path: Path,
) -> None:
    """Table 9 has news_headline: 4 epochs of 16 a batch. The artefact's 2 of 4 are for devices."""
    replace(make_artefact(base), task=TASKS[TASK].resolved(False)).save(tmp_path / "artefact")
    spec = dict.fromkeys(("layers", "positions", "collective_rank", "personal_rank"))
    asked = spec | {"epochs": None, "batch_size": None, "users": 1, "artefact": tmp_path / "artefact"}
    assert run_lamp(request_for(**asked), base=base).users[0].steps == 8
    other = run_lamp(request_for(schedule="device", out=tmp_path / "other", **asked), base=base)
    assert (other.settings["epochs"], other.settings["batch_size"]) == (2, 4)


NEW = ("schedule", "prompts", "artefact_prompts", "answer_tokens", "stop", "token_cap", "shortened")
NEW += ("frequency_penalty", "presence_penalty", "asked_epochs", "asked_batch_size", "method", "rate_growth")


@pytest.mark.parametrize(
    ("new", "schedule_then"), [(NEW, "old device"), (("rate_growth", "method"), "linear device")]
)
def test_a_run_of_an_earlier_version_says_its_schedule_and_is_not_gone_on_with(
    new: tuple[str, ...], schedule_then: str, request_for: Callable[..., LampRequest], base: BaseModel
) -> None:
    """The first "device" took the artefact's epochs and batches on the whole history, as no device does.

    The next one's rate warmed up and decayed.
    """
    asked = {"frequency_penalty": 0.0, **ALONE}  # there was none
    run = run_lamp(request_for(schedule="device", **asked), base=base)
    for name in ("settings.json", "run.json"):
        path = run.folder / name
        written = json.loads(path.read_text())
        settings = written["settings"] if name == "run.json" else written
        for key in new:
            del settings[key]
        settings["ablation"] = "stage2"  # its word for the method
        path.write_text(json.dumps(written))
    old = Run.load(run.folder)
    assert (old.prompts, old.settings["schedule"]) == ("task", schedule_then)
    for schedule in ("device", "paper"):
        with pytest.raises(InvalidInput, match="schedule; use another --out"):
            run_lamp(request_for(schedule=schedule, **asked), base=base)


def test_a_paper_run_of_an_earlier_version_goes_on(
    request_for: Callable[..., LampRequest], base: BaseModel
) -> None:
    run = run_lamp(request_for(**ALONE), base=base)
    path = run.folder / "settings.json"
    settings = json.loads(path.read_text())
    del settings["asked_epochs"], settings["asked_batch_size"], settings["rate_growth"]
    path.write_text(json.dumps(settings))
    assert run_lamp(request_for(**ALONE), base=base).users == run.users


def test_long_examples_are_cut_not_left_out(data: Path, base: BaseModel, tmp_path: Path) -> None:
    """A history item over the context was left out, where the reference cuts it."""
    changed = tmp_path / "data"
    shutil.copytree(data, changed)
    users = json.loads((changed / "user_top_100_history.json").read_text())
    users[0]["profile"][0]["text"] = " ".join(["cat dog"] * 300)
    users[0]["profile"][1]["title"] = " ".join(["cat dog"] * 300)
    (changed / "user_top_100_history.json").write_text(json.dumps(users))
    task: Task = TASKS[TASK]
    people = read_people(changed, task, base)
    assert (people.counts.shortened, people.counts.dropped_long, people.token_cap) == (1, 1, 256)
    encoder = Encoder(base, task)
    person, whole = (
        Learner.of(found.people[0], encoder) for found in (people, read_people(data, task, base))
    )
    assert len(person.history) == len(whole.history) - 1
    assert max(person.lengths) == 256
    longest = person.history[person.lengths.index(256)][0]
    whole_prompt = whole.history[0][0]
    assert longest[:20] == whole_prompt[:20] and longest[-5:] == whole_prompt[-5:], "instruction and cue"
