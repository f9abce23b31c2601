"""The rate of personal training: chosen on people of the collective data, once, alike for every method."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support.lamp_files import TASK, WORDS, item, query, write_files
from tests.support.lamp_requests import task_data

from perfit_cloud.collective.blank import RATE
from perfit_cloud.engine.gradients.batch import Pair
from perfit_cloud.lamp.methods import METHODS
from perfit_cloud.lamp.methods.interface import Done, Method, TaskData
from perfit_cloud.lamp.methods.personal_rate import Trial, choose_personal_rate
from perfit_cloud.lamp.request import LampRequest
from perfit_cloud.model.base import BaseModel
from perfit_shared.errors import Cancelled, InvalidData, UpdateFailed

LONG = 20  # examples of those people whose histories are long enough


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `write_files`, and three collective people have long histories."""
    made = write_files(tmp_path_factory.mktemp("lamp"))
    others, rng = json.loads((made / "user_others.json").read_text()), np.random.default_rng(1)
    for user in range(3):
        past = [item(rng, 5000 + 100 * user + k, WORDS[user]) for k in range(LONG)]
        others[user] = {"user_id": user, "profile": past, "query": [query(past[0], gold=True)]}
    (made / "user_others.json").write_text(json.dumps(others))
    return made


@pytest.fixture(scope="module")
def data(folder: Path, base: BaseModel) -> TaskData:
    return task_data(folder, base)


class Trials:
    """Remembers what was tried; 3e-3 is the best rate, and above 5e-3 training diverges."""

    def __init__(self) -> None:
        self.made: list[tuple[int, int, float | None]] = []

    def __call__(
        self, train: Sequence[Pair], test: Sequence[Pair], rate: float | None, stepped: Done
    ) -> float:
        self.made.append((len(train), len(test), rate))
        stepped(len(train))
        if rate is not None and rate > 5e-3:
            raise UpdateFailed("too high")
        return 2.0 if rate is None else 1.0 + abs(math.log(rate / 3e-3))


def choose(request: LampRequest, data: TaskData, trial: Trial, **options: Any) -> tuple[float, float]:
    options = {"stop": lambda: False, "work": len, "depends": {}} | options
    return choose_personal_rate(request, data, trial, **options)


def test_it_is_chosen_on_long_histories_once(
    folder: Path, data: TaskData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    request = LampRequest(TASK, "tiny", folder, tmp_path / "a")
    trials = Trials()
    rate, seconds = choose(request, data, trials)
    assert rate == 3e-3 and seconds > 0
    assert {made[:2] for made in trials.made} == {(16, 4)}
    assert [made[2] for made in trials.made].count(rate) == 2, "people"
    assert "held-out loss 2.0000 -> 1.0000" in capsys.readouterr().err
    again = Trials()
    assert choose(request, data, again) == (rate, seconds) and not again.made
    elsewhere = replace(request, out=tmp_path / "b", reuse=tmp_path / "a")
    assert choose(elsewhere, data, again) == (rate, seconds) and not again.made
    assert choose(replace(elsewhere, reuse=None), data, again) == (rate, seconds), "it is written there, too"
    choose(elsewhere, data, again, depends={"epochs": 3})
    assert again.made, "another training may want another rate"
    assert choose(replace(request, learning_rate=0.5), data, Trials()) == (0.5, 0.0)


def test_histories_are_as_long_as_those_of_the_people_tested(
    folder: Path, data: TaskData, tmp_path: Path
) -> None:
    for examples, sizes in ((12, (9, 3)), (3, (7, 3)), (None, (16, 4))):
        trials = Trials()
        choose(LampRequest(TASK, "tiny", folder, tmp_path / str(examples), examples=examples), data, trials)
        assert {made[:2] for made in trials.made} == {sizes}


def test_without_people_to_try_it_on_there_is_a_fallback(
    data: TaskData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = LampRequest(TASK, "tiny", write_files(tmp_path / "short"), tmp_path / "a")
    assert choose(short, data, Trials()) == (RATE, 0.0)
    assert "long enough" in capsys.readouterr().err
    (short.data / "user_others.json").unlink()
    assert choose(short, data, Trials(), fallback=0.25) == (0.25, 0.0)


def test_a_run_keeps_its_rate_and_nobody_tries_one_for_nothing(
    folder: Path, data: TaskData, tmp_path: Path
) -> None:
    request, trials = LampRequest(TASK, "tiny", folder, tmp_path), Trials()
    assert choose(replace(request, examples=0), data, trials, fallback=0.5) == (0.5, 0.0)
    (tmp_path / "settings.json").write_text('{"learning_rate": 0.25}')  # of a run before there were trials
    assert choose(request, data, trials) == (0.25, 0.0) and not trials.made


def test_another_methods_rate_is_not_taken(open_method: Callable[..., Method[Any]], tmp_path: Path) -> None:
    """LoRA-P's files had all that LoFiT's depended on."""
    open_method("lora-p")
    open_method("lofit", reuse=tmp_path / "lora-p")
    theirs, ours = (
        json.loads((tmp_path / name / "personal_rate.json").read_text()) for name in ("lora-p", "lofit")
    )
    assert theirs["trials"] != ours["trials"]


def test_a_stop_and_a_damaged_file(folder: Path, data: TaskData, tmp_path: Path) -> None:
    request = LampRequest(TASK, "tiny", folder, tmp_path)
    with pytest.raises(Cancelled):
        choose(request, data, Trials(), stop=lambda: True)
    choose(request, data, Trials())
    path = tmp_path / "personal_rate.json"
    whole = json.loads(path.read_text())
    nameless = {name: value for name, value in whole.items() if name != "rate"}
    for damaged in ("", "[]", "{}", "\0", json.dumps(nameless), json.dumps(whole | {"rate": "x"})):
        path.write_text(damaged)
        with pytest.raises(InvalidData, match="damaged"):
            choose(request, data, Trials())


@pytest.fixture
def open_method(
    method_request: Callable[..., LampRequest], folder: Path, data: TaskData, tmp_path: Path
) -> Iterator[Callable[..., Method[Any]]]:
    opened: list[Method[Any]] = []

    def make(name: str, **changes: Any) -> Method[Any]:
        asked = {"data": folder, "learning_rate": None, "epochs": 1, "out": tmp_path / name}
        opened.append(METHODS[name](method_request(name, **(asked | changes)), data))
        opened[-1].prepare(lambda: False)
        return opened[-1]

    yield make
    for method in opened:
        method.close()


def test_perfit_takes_the_artefacts_rate_for_a_devices_schedule_alone(
    open_method: Callable[..., Method[Any]], tmp_path: Path
) -> None:
    """The artefact's is chosen for a device's many steps; the paper's few want a higher one."""
    on_device = open_method("perfit", schedule="device")
    assert on_device.settings["learning_rate"] == on_device.artefact.learning_rate
    assert not (tmp_path / "perfit" / "personal_rate.json").exists()
    by_paper = open_method("perfit", out=tmp_path / "paper")
    found = json.loads((tmp_path / "paper" / "personal_rate.json").read_text())
    assert by_paper.settings["learning_rate"] == found["rate"] and found["users"] == 3
    assert len(found["trials"]) >= 3 and found["trials"][f"{found['rate']:g}"] < found["start"]
    assert found["depends"]["artefact"] == by_paper.artefact.version


@pytest.mark.parametrize("name", ["perfit_stage1", "perfit_stage1+rag"])
def test_who_trains_nobody_tries_no_rate(
    name: str, open_method: Callable[..., Method[Any]], tmp_path: Path
) -> None:
    open_method(name)
    assert not (tmp_path / name / "personal_rate.json").exists()


@pytest.mark.parametrize("schedule", ["paper", "device"])
def test_without_stage_1_trials_choose_it(
    schedule: str, open_method: Callable[..., Method[Any]], tmp_path: Path
) -> None:
    reft = open_method("reft", schedule=schedule)
    found = json.loads((tmp_path / "reft" / "personal_rate.json").read_text())
    assert reft.settings["learning_rate"] == found["rate"] and found["depends"]["schedule"] == schedule
