"""What a LaMP run is asked for: in whose words, for whom stage 1 is, and what another run has already."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.support.lamp_files import LORA_STAGE_1, TASK, write_files
from tests.support.lamp_requests import task_data
from tests.support.models import random_shift

from perfit_cloud.lamp import stage2
from perfit_cloud.lamp.cohorts import CohortWork
from perfit_cloud.lamp.methods import METHODS
from perfit_cloud.lamp.methods.interface import TaskData
from perfit_cloud.lamp.request import LampRequest
from perfit_cloud.lamp.results import MODES
from perfit_cloud.lamp.run import run_lamp
from perfit_cloud.lamp.stage1 import collective_corpus
from perfit_cloud.model.artefacts import Artefact
from perfit_cloud.model.base import BaseModel
from perfit_shared.errors import InvalidInput


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_files(tmp_path / "data")


@pytest.fixture
def data(folder: Path, base: BaseModel) -> TaskData:
    return task_data(folder, base)


def test_a_method_without_the_artefact_asks_in_its_words(
    method_request: Callable[..., LampRequest],
    base: BaseModel,
    make_artefact: Callable[..., Artefact],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Else methods would be compared on other prompts than the shift's."""
    made = make_artefact(base)
    asked = replace(made.task, template=f"In other words: {made.task.template}")
    replace(made, task=asked).save(tmp_path / "words")
    run = run_lamp(replace(method_request("none", users=2), artefact=tmp_path / "words"), base=base)
    assert run.task.template == asked.template
    assert "none does not use: artefact (but it asks in the artefact's words)" in capsys.readouterr().err


@pytest.mark.slow
def test_what_would_come_out_the_same_is_taken_from_another_run(
    method_request: Callable[..., LampRequest],
    base: BaseModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Answers of the untouched model and of the same collective shift, and the shifts of PerFit."""
    first = run_lamp(method_request(users=2, out=tmp_path / "first"), base=base)
    plain = run_lamp(method_request("perfit+rag", users=2, out=tmp_path / "plain"), base=base)
    measured: list[str] = []
    measure = CohortWork.measure

    def counted(self: CohortWork, cohort: Any, mode: str, *rest: Any) -> None:
        measured.append(mode)
        measure(self, cohort, mode, *rest)

    monkeypatch.setattr(CohortWork, "measure", counted)
    with monkeypatch.context() as patched:
        patched.setattr(stage2, "train", lambda *_, **__: pytest.fail("the shifts are there"))
        given = {"users": 2, "reuse": first.folder}
        taken = run_lamp(method_request("perfit+rag", out=tmp_path / "taken", **given), base=base)
    assert taken.users == plain.users and taken.seconds["fit"] == first.seconds["fit"]
    assert measured == ["personal", "other"]
    measured.clear()
    behind = run_lamp(method_request("perfit_behind+rag", out=tmp_path / "behind", **given), base=base)
    assert measured == ["personal", "other"] and behind.users != plain.users, "it learns something else"
    measured.clear()
    words = {"artefact": tmp_path / "artefact"}
    run_lamp(replace(method_request("perfit_stage2", out=tmp_path / "alone", **given), **words), base=base)
    assert measured == ["personal", "other"]  # its identity is no collective shift, and is not measured
    measured.clear()
    run_lamp(replace(method_request("lora-c", out=tmp_path / "lora-c", **given), **words), base=base)
    assert measured == ["collective"]  # of another collective state
    with pytest.raises(InvalidInput, match="differs from this run in asked"):
        request = method_request("none", out=tmp_path / "other", users=1, reuse=first.folder)
        run_lamp(replace(request, **words), base=base)


def test_some_modes_alone(
    base: BaseModel,
    method_request: Callable[..., LampRequest],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is asked for is what is measured, with the same figures; nobody is fitted for shared modes."""
    same: dict[str, Any] = {"users": 2, "queries": 1}
    whole = run_lamp(method_request(**same), base=base)
    only = {**same, "out": tmp_path / "few", "modes": ("personal", "base")}
    few = run_lamp(method_request(**only), base=base)
    assert few.modes == ("base", "personal")
    for one, two in zip(few.users, whole.users, strict=True):
        for query, other in zip(one.queries, two.queries, strict=True):
            assert query.loss == {mode: other.loss[mode] for mode in few.modes}
            assert query.answers == {mode: other.answers[mode] for mode in few.modes}
    monkeypatch.setattr(stage2, "train", lambda *_, **__: pytest.fail("nobody's own state is asked for"))
    shared = run_lamp(method_request(**same, out=tmp_path / "shared", modes=("seed",)), base=base)
    assert shared.modes == ("seed",)
    predictions = json.loads((shared.folder / "predictions.json").read_text("utf-8"))
    assert len(predictions["golds"]) == 2
    again = run_lamp(method_request(**{**only, "modes": ("base",)}), base=base)
    assert again.users == few.users, "a run that has more than is asked for is only read"
    with pytest.raises(InvalidInput, match="none has other modes: base"):
        run_lamp(method_request("none", out=tmp_path / "none", modes=("personal",)), base=base)


def test_nobody_has_a_history(method_request: Callable[..., LampRequest], base: BaseModel) -> None:
    """0 examples: everybody stays at the start."""
    run = run_lamp(method_request(users=2, examples=0, queries=1), base=base)
    for user in run.users:
        (query,) = user.queries
        assert (user.examples, user.steps) == (0, 0)
        assert query.loss["personal"] == query.loss["seed"]
        assert query.answers["personal"] == query.answers["seed"]


def test_a_collective_lora_learns_from_one_group_of_users(
    folder: Path, data: TaskData, tmp_path: Path
) -> None:
    """Table 15: the groups are PerFit's, disjoint and of equal size, and a LoRA of one is none of another."""

    def of_group(group: int | None, **changes: Any) -> LampRequest:
        values = {**LORA_STAGE_1, "collective_users": None, "collective_epochs": 1, "collective_group": group}
        return LampRequest(TASK, "tiny", folder, tmp_path, **{"method": "lora-c", **values, **changes})

    def users(group: int) -> set[str]:
        corpus = collective_corpus(of_group(group), data)
        return {*corpus.train, *corpus.validated}

    groups = [users(group) for group in range(5)]
    assert [len(group) for group in groups] == [2] * 5 and len(set.union(*groups)) == 10
    for name in ("lora-c", "oppu", "lora-c+perfit"):
        assert "collective_group" in METHODS[name].options
        with pytest.raises(InvalidInput, match="collective group: a LoRA is given"):
            of_group(1, method=name, lora=tmp_path, collective_epochs=None, collective_learning_rate=None)
    METHODS["lora-c"](of_group(1), data).prepare(lambda: False)
    with pytest.raises(InvalidInput, match="other group"):
        METHODS["lora-c"](of_group(2), data).prepare(lambda: False)
    with pytest.raises(InvalidInput, match="other group"):
        METHODS["lora-c"](of_group(None), data).prepare(lambda: False)
    again = METHODS["lora-c"](of_group(1), data)
    again.prepare(lambda: pytest.fail("it was trained again"))
    assert again.settings["collective_group"] == 1


def test_a_stage_1_that_cannot_be_is_refused_before_work_begins(folder: Path, tmp_path: Path) -> None:
    """A rate of 0 or of nan was found out after the model was loaded and the data read."""
    for changes in ({"collective_learning_rate": 0.0}, {"collective_learning_rate": math.nan}):
        with pytest.raises(InvalidInput, match="rate"):
            LampRequest(TASK, "tiny", folder, tmp_path, **changes)
    with pytest.raises(InvalidInput, match="leave one out"):
        LampRequest(TASK, "tiny", folder, tmp_path, collective_users=3, collective_group=0)


@pytest.mark.parametrize("name", METHODS)
def test_modes_are_known_before_anything_is_trained(
    name: str, method_request: Callable[..., LampRequest], data: TaskData
) -> None:
    request = method_request(name)
    with closing(METHODS[name](request, data)) as method:
        method.prepare(lambda: False)
        assert set(method.shared) == set(method.shared_modes)
    wrong = set(MODES) - set(METHODS[name].modes())
    if wrong:
        with pytest.raises(InvalidInput, match="has other modes"):
            method_request(name, modes=tuple(wrong))


def test_who_cannot_be_trained_has_their_examples_before_the_query(
    method_request: Callable[..., LampRequest], base: BaseModel, tmp_path: Path
) -> None:
    """With four examples a device does not train; its answers had none of them before the query."""
    same = {
        "schedule": "device",
        "examples": 4,
        "users": 2,
        "modes": ("seed", "personal"),
        "k": 2,
        "epochs": None,
    }
    with_start = run_lamp(method_request("perfit_stage1+rag", out=tmp_path / "start", **same), base=base)
    trained = run_lamp(method_request("perfit+rag", out=tmp_path / "trained", **same), base=base)
    for one, other in zip(with_start.users, trained.users, strict=True):
        assert [q.loss["personal"] for q in one.queries] == [q.loss["personal"] for q in other.queries]
        assert all(q.loss["personal"] != q.loss["seed"] for q in other.queries)


def test_another_users_history_wants_another_user(
    method_request: Callable[..., LampRequest], base: BaseModel, tmp_path: Path
) -> None:
    """One user trained on the own history, under the name of another's."""
    request = method_request("perfit", histories="other", out=tmp_path / "out")
    with pytest.raises(InvalidInput, match="second user"):
        run_lamp(replace(request, users=1), base=base)
    assert "other" not in run_lamp(replace(request, users=2, epochs=1), base=base).modes


def test_other_communities_are_another_run(
    method_request: Callable[..., LampRequest],
    base: BaseModel,
    make_artefact: Callable[..., Artefact],
    tmp_path: Path,
) -> None:
    """An artefact's version leaves its communities out, and their number was all that was compared."""
    plain = make_artefact(base)
    spec = plain.spec
    for name, seed in (("one", 1), ("two", 2)):
        community = random_shift(spec, spec.personal_rank, seed)
        replace(plain, communities=(community,)).save(tmp_path / name)
    request = method_request("perfit", schedule="device", epochs=1, users=2, artefact=tmp_path / "one")
    run_lamp(request, base=base)
    with pytest.raises(InvalidInput, match="community seeds"):
        run_lamp(replace(request, artefact=tmp_path / "two"), base=base)
