"""summary.json of invented runs, against numbers worked out by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from tests.support.lamp_runs import LABELS, RATINGS, SETTINGS, TEXTS, query, save_run, simple_users, user

from perfit_cloud.lamp.results import UserResult, write_json
from perfit_cloud.lamp.summary import summarise
from perfit_shared.errors import InvalidData

MODES = ("base", "collective", "personal", "other")


@pytest.fixture
def two_users() -> list[UserResult]:
    """Ann has one query of 4 tokens; Bob three, of 1, 1 and 2 tokens."""

    def losses(*values: float) -> dict[str, float]:
        return dict(zip(MODES, values, strict=True))

    def answers(*texts: str) -> dict[str, str]:
        return dict(zip(MODES, texts, strict=True))

    return [
        user("ann", [query(1, "a", answers("b", "a", "a", "x"), losses(4, 3, 1, 5), tokens=4)]),
        user(
            "bob",
            [
                query(2, "b", answers("b", "b", "b", "b"), losses(1, 1, 1, 1), tokens=1),
                query(3, "b", answers("c", "c", "b", "a"), losses(3, 2, 1, 3), tokens=1),
                query(4, "a", answers("a", "b", "b", "b"), losses(4, 3, 2, 5), tokens=2),
            ],
        ),
    ]


def test_every_number_by_hand(tmp_path: Path, two_users: list[UserResult]) -> None:
    summary = summarise(save_run(tmp_path, LABELS, two_users))
    # Bob's base: (1·1 + 3·1 + 4·2) / 4 = 3; users count alike: (4 + 3) / 2.
    assert summary["loss"] == {"base": 3.5, "collective": 2.625, "personal": 1.25, "other": 4.25}
    # All four queries alike.
    assert summary["metrics"]["accuracy"] == {"base": 0.5, "collective": 0.5, "personal": 0.75, "other": 0.25}
    # Ann 1 of 1, Bob 2 of 3.
    assert summary["mean_over_users"]["accuracy"]["personal"] == pytest.approx(5 / 6)
    # Personal answers a, b, b, b for a, b, b, a: a 2·1/3, b 2·2/5, c 0.
    assert summary["metrics"]["macro_f1"]["personal"] == pytest.approx((2 / 3 + 4 / 5) / 3)
    ann, bob = summary["users"]
    third = pytest.approx(1 / 3)  # one label of three right, the others never there
    assert ann == {
        "user_id": "ann",
        "loss": {"base": 4, "collective": 3, "personal": 1, "other": 5},
        "metrics": {
            "accuracy": {"base": 0, "collective": 1, "personal": 1, "other": 0},
            "macro_f1": {"base": 0, "collective": third, "personal": third, "other": 0},
        },
        "queries": 1,
        "tokens": 4,
        "examples": 10,
        "steps": 5,
    }
    assert (bob["queries"], bob["tokens"], bob["loss"]["personal"]) == (3, 4, 1.5)


def test_its_form(tmp_path: Path, two_users: list[UserResult]) -> None:
    run = save_run(tmp_path, LABELS, two_users)
    summary = summarise(run)
    assert list(summary) == [
        "task",
        "loss",
        "metrics",
        "mean_over_users",
        "users",
        "seconds",
        "settings",
        "intervals",
        "paired",
    ]
    assert summary["task"] == "news_categorize"
    assert summary["seconds"] == {"preparation": 100, "fit": 30, "answers": 6}
    written = dict(SETTINGS) | {"task": LABELS.name, "artefact_task": LABELS.name}
    del written["ablation"]  # an older run's word for its method
    # And what a run from before it was written did.
    assert summary["settings"] == written | {
        "method": "perfit",
        "schedule": "device",
        "chat": False,
        "prompts": "task",
        "artefact_prompts": "task",
        "community_seeds": None,
        "answer_tokens": 48,
        "stop": ["\n"],
        "frequency_penalty": 0.0,
        "presence_penalty": 0.0,
    }
    for kind in ("loss", "metrics", "mean_over_users"):
        assert _shape(summary["intervals"][kind]) == _shape(summary[kind])
    low, high = summary["intervals"]["loss"]["base"]
    assert 3 <= low <= 3.5 <= high <= 4  # between the two users
    pairs = ("personal_vs_collective", "personal_vs_other", "personal_vs_base", "collective_vs_base")
    assert tuple(summary["paired"]) == pairs
    found = summary["paired"]["personal_vs_collective"]["loss"]
    assert found["difference"] == pytest.approx(1.25 - 2.625)
    assert (found["better"], found["worse"], found["of"]) == (2, 0, 2)
    assert found["p"] == 0.5  # the least of two users
    # Means over users: (1 + 2/3) / 2 against (1 + 1/3) / 2.
    found = summary["paired"]["personal_vs_collective"]["mean_over_users"]["accuracy"]
    assert found["difference"] == pytest.approx(1 / 6)
    assert summarise(run) == summary  # the same every time
    write_json(tmp_path / "summary.json", summary)
    assert json.loads((tmp_path / "summary.json").read_text("utf-8")) == summary


def _shape(nest: Any) -> Any:
    """The keys of nested objects."""
    return {key: _shape(value) for key, value in nest.items()} if isinstance(nest, dict) else None


def test_only_what_was_measured(tmp_path: Path) -> None:
    summary = summarise(save_run(tmp_path, LABELS, simple_users({"base": 2.0, "collective": 1.5})))
    assert list(summary["loss"]) == ["base", "collective"]
    assert summary["metrics"]["accuracy"] == {"base": 0, "collective": 1}
    assert list(summary["paired"]) == ["collective_vs_base"]


def test_ratings_and_texts(tmp_path: Path) -> None:
    losses = {"personal": 1.0}
    ratings = [
        user("ann", [query(1, "5", {"personal": "4"}, losses), query(2, "1", {"personal": "bad"}, losses)]),
        user("bob", [query(3, "3", {"personal": "3"}, losses)]),
    ]
    summary = summarise(save_run(tmp_path / "r", RATINGS, ratings))
    metrics = summary["metrics"]
    assert [one["metrics"]["mae"]["personal"] for one in summary["users"]] == [2.5, 0]
    assert metrics["mae"]["personal"] == pytest.approx((1 + 4 + 0) / 3)
    assert metrics["rmse"]["personal"] == pytest.approx(math.sqrt(17 / 3))
    texts = [user("ann", [query(1, "the cat ran", {"personal": "the cat"}, losses)])]
    summary = summarise(save_run(tmp_path / "t", TEXTS, texts))
    assert summary["metrics"]["rouge_1"]["personal"] == pytest.approx(4 / 5)
    assert summary["intervals"]["loss"]["personal"] is None  # of one user


def test_a_diverged_run_is_still_json(tmp_path: Path) -> None:
    users = simple_users({"collective": 2.0, "personal": math.nan})
    summary = summarise(save_run(tmp_path, LABELS, users))
    text = json.dumps(summary, allow_nan=False)
    assert summary["loss"] == {"collective": pytest.approx(2.1), "personal": None}
    assert summary["paired"]["personal_vs_collective"]["loss"]["p"] is None
    assert "NaN" not in text


def test_a_user_without_queries_is_named(tmp_path: Path) -> None:
    users = [*simple_users({"base": 1.0}), user("zoe", [])]
    with pytest.raises(InvalidData, match="zoe"):
        summarise(save_run(tmp_path, LABELS, users))
