"""Rates that nobody gave are safe: the ladder, near ties, the step that is taken, what devices get."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.support.collective import small_request, write_toy

from perfit_cloud.collective import trials
from perfit_cloud.collective.run import CollectiveRequest, train_collective
from perfit_cloud.collective.trials import Search
from perfit_shared.training import Schedule


def searched(losses: dict[float, float], start: float = 5.0) -> tuple[float, list[float]]:
    """(what is chosen, what was tried) where a rate's loss is that of the nearest rate given."""
    tried: list[float] = []

    def loss_of(rate: float) -> float:
        tried.append(rate)
        return losses[min(losses, key=lambda r: abs(math.log(r / rate)))]

    return Search(loss_of, start).run(), tried


def test_the_ladder_reaches_down_to_a_tenth_of_the_paper_s_rate() -> None:
    rate, tried = searched({1e-5: 4.0, 3e-5: 4.9, 1e-4: 5.1, 1e-3: 6.0})
    assert rate == 1e-5
    assert 3e-3 not in tried and 1e-2 not in tried  # nothing is tried far above what was worse already


def test_the_ladder_reaches_up_for_small_models() -> None:
    losses = {1e-5: 4.99, 1e-4: 4.9, 1e-3: 4.5, 3e-3: 4.2, 1e-2: 3.0, 3e-2: 2.0}
    assert searched(losses)[0] == 3e-2


def test_of_near_ties_the_lowest_is_taken() -> None:
    # What a real model gave: l7 at 1e-3 and f7+l7 at 1e-4 ended alike, one of them by luck.
    losses = {1e-5: 4.6, 3e-5: 4.4, 1e-4: 4.28, 3e-4: 4.27, 1e-3: 4.27, 3e-3: 4.5}
    assert searched(losses, start=4.7)[0] == 1e-4
    assert searched(losses | {1e-4: 4.4}, start=4.7)[0] == 3e-4


def test_where_no_rate_gains_it_is_the_lowest() -> None:
    assert searched({1e-5: 5.0, 1e-4: 5.01, 1e-3: math.inf})[0] == 1e-5


def test_a_search_ends_where_everything_diverges() -> None:
    assert searched({1e-5: math.inf})[0] == 1e-5


# -- runs --------------------------------------------------------------------------------------------


@pytest.fixture
def make_request(model_folder: Callable[[str], Path], tmp_path: Path) -> Callable[..., CollectiveRequest]:
    data = write_toy(tmp_path / "news")

    def make(**changes: Any) -> CollectiveRequest:
        given = {"data": data, "model": str(model_folder("llama")), "out": tmp_path / "out"}
        return small_request(**{**given, "epochs": 4, "threads": 1, **changes})

    return make


def test_a_rate_that_spoils_leaves_the_model_no_worse_than_it_was(make_request: Any) -> None:
    artefact = train_collective(make_request(learning_rate=0.99))
    losses, curve = artefact.card["losses"], artefact.card["losses"]["validation_curve"]
    assert max(loss for _, loss in curve) > curve[0][1], "a rate of 0.99 should spoil, or nothing is shown"
    assert losses["validation"]["seed"] <= losses["validation"]["base"] + 1e-6
    assert losses["taken_at_step"] == min(curve, key=lambda point: point[1])[0]


def test_training_ends_when_validation_no_longer_falls(make_request: Any) -> None:
    card = train_collective(make_request(learning_rate=0.9, epochs=20)).card
    assert card["losses"]["stopped_early"]
    assert card["hyper_parameters"]["steps"] < 20 * 9
    assert card["losses"]["taken_at_step"] < card["hyper_parameters"]["steps"]


def test_the_step_taken_is_not_the_last_where_an_earlier_one_was_better(make_request: Any) -> None:
    """Of the validation points of a run, the artefact measures as the lowest."""
    card = train_collective(make_request(learning_rate=0.2, epochs=6)).card
    lowest = min(loss for _, loss in card["losses"]["validation_curve"])
    assert card["losses"]["validation"]["seed"] == pytest.approx(lowest, rel=1e-5)


def test_trials_are_no_shorter_than_twenty_steps(make_request: Any) -> None:
    card = train_collective(make_request(learning_rate=None)).card
    assert {trial["steps"] for trial in card["trials"]} <= {20, 10}  # 10: ended half-way
    assert any(trial["steps"] == 20 for trial in card["trials"])


def test_without_users_to_try_on_devices_get_stage_1_s_rate(make_request: Any, tmp_path: Path) -> None:
    short = write_toy(tmp_path / "short", users=30, items=5)
    artefact = train_collective(make_request(data=short, device_learning_rate=None, learning_rate=3e-3))
    assert artefact.learning_rate == 3e-3
    assert "stage 1's rate" in artefact.card["device_trials_note"]


@pytest.mark.slow
def test_where_trial_updates_tell_nothing_devices_get_no_more_than_stage_1_s_rate(
    make_request: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trials, "_LEAST_GAIN", 1.0)
    monkeypatch.setattr(trials, "LADDER", (1e-4, 1e-3))
    artefact = train_collective(make_request(device_learning_rate=None, learning_rate=3e-4))
    assert len(artefact.card["device_trials"]) == 2
    assert artefact.learning_rate <= 3e-4


def test_trial_updates_are_those_of_a_device(make_request: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 16 examples 3 test, and 13 train in folds; the card's 4 epochs of 16 are for long histories."""
    seen: list[tuple[int, Schedule, int]] = []
    outcomes: list[object] = []
    train_people = trials.train_people

    def noted(engine: Any, artefact: Any, histories: Any, trainings: Any) -> Iterator[list[int]]:
        assert {each.judged for each in trainings} == {-1}, "so that no update is taken that is no better"
        yield from train_people(engine, artefact, histories, trainings)
        for history, done in zip(histories, trainings, strict=True):
            seen.append((len(history), done.schedule, done.step))
            assert done.judged == done.step
            outcomes.append(done.outcome(artefact.seed))

    monkeypatch.setattr(trials, "train_people", noted)
    monkeypatch.setattr(trials, "LADDER", (1e-2,))
    monkeypatch.setattr(trials, "_FIRST", (1e-2,))
    card = train_collective(make_request(device_learning_rate=None, device_epochs=4, batch_size=16)).card
    (trial,) = card["device_trials"]
    assert [each[:2] for each in seen] == [(13, Schedule(19, 1e-2, 4, 0, 13, folds=3))] * trial["users"]
    assert all(0 < steps <= 76 for _, _, steps in seen)
    assert trial["users"] >= 2
    assert (trial["after"] == trial["before"]) == all(each is None for each in outcomes)


@pytest.mark.slow
def test_profiles_are_tried_on_where_queries_are_too_few(
    make_request: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LaMP-3, 5 and 7: about one query a user to train on, and a long profile."""
    import json

    monkeypatch.setattr(trials, "LADDER", (1e-4, 1e-3))
    data = write_toy(tmp_path / "rare", users=40, items=20)
    path = data / "user_others.json"
    users = json.loads(path.read_text())
    for user in users:
        last = user["profile"].pop()
        user["query"] = [{"id": last["id"], "input": f"article: {last['text']}", "gold": last["title"]}]
    path.write_text(json.dumps(users))
    card = train_collective(make_request(data=data, device_learning_rate=None, epochs=3)).card
    assert card["data"]["rows"] == "query" and card["data"]["examples"] == 40
    assert card["device_trials"], "nobody was tried on"
    assert "2 of 2 were not part of stage 1" in card["device_trials_note"]


def test_sinks_are_left_out_of_what_is_trained(
    make_request: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from perfit_cloud.model import sinks

    monkeypatch.setattr(sinks, "leading_sinks", lambda *_args: 1)
    artefact = train_collective(make_request(epochs=1))
    assert artefact.spec.positions == "s1+f2+l2"
    assert "the first token, an attention sink, stays as it is" in capsys.readouterr().err
    plain = train_collective(make_request(epochs=1, positions="s0+f2+l2", force=True))
    assert plain.spec.positions == "f2+l2" and plain.version != artefact.version
