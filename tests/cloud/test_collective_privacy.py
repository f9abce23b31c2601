"""Stage 1 with differential privacy by person: what one person can move, the noise, the account, the card."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.support.collective import StopAfter, small_request, write_toy
from typer.testing import CliRunner

from perfit_cloud.collective import training, trials
from perfit_cloud.collective.optimizer import StiefelAdam
from perfit_cloud.collective.privacy import (
    Budget,
    Privacy,
    PrivateSteps,
    clip,
    draw,
    epsilon_spent,
    noise_for,
)
from perfit_cloud.collective.run import CollectiveRequest, train_collective
from perfit_cloud.collective.steps import trainable
from perfit_shared.errors import Cancelled, InvalidInput
from perfit_shared.shifts import ShiftSpec, ShiftTensors

SPEC = ShiftSpec((1, 2), "l2", 2, 2, 16)
NOISELESS = Privacy(
    epsilon=8.0, delta=1e-3, clip_norm=0.5, people=4, sampling_rate=1.0, steps=1, noise_multiplier=0.0
)


class Told:
    """In place of Losses: the gradient of a pair is what its first token says."""

    def __init__(self, tensors: list[torch.Tensor], size: dict[int, float]) -> None:
        self.tensors, self.size = tensors, size

    def backward(self, pairs: Any, **_: Any) -> float:
        for tensor in self.tensors:
            tensor.grad = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
            tensor.grad += sum(self.size[prompt[0]] for prompt, _ in pairs)
        return 0.0


def sums(size: dict[int, float], privacy: Privacy = NOISELESS) -> torch.Tensor:
    """The mean that the optimizer gets of four people, one with each of these gradients, as one vector."""
    shift = trainable(ShiftTensors.identity(SPEC, 2), torch.device("cpu"), rotations=False)
    optimizer = StiefelAdam([shift])
    seen: list[torch.Tensor] = []
    optimizer.step = lambda _rate: seen.extend(g.clone() for g in optimizer.gradients()) or 0.0  # type: ignore[method-assign]
    tensors = [t for phi in shift.values() for t in phi if t.requires_grad]
    people = {str(token): [([token], [1])] for token in size}
    steps = PrivateSteps(Told(tensors, size), people, privacy, rng=np.random.default_rng(0))  # type: ignore[arg-type]
    steps.step(collective={}, personal=shift, optimizer=optimizer, rate=0.1)
    return torch.cat([g.flatten() for g in seen])


# -- one person --------------------------------------------------------------------------------------


@pytest.mark.parametrize("huge", [1.0, 1e9, -1e30, math.nan, math.inf])
def test_no_person_moves_the_sum_by_more_than_the_clip_norm(huge: float) -> None:
    people = NOISELESS.expected
    without = sums({1: 1e-3, 2: -2e-3, 3: 1e-3, 4: 0.0}) * people
    with_one = sums({1: 1e-3, 2: -2e-3, 3: 1e-3, 4: huge}) * people
    assert float((with_one - without).norm()) <= NOISELESS.clip_norm * (1 + 1e-6)
    if math.isfinite(huge):
        assert float((with_one - without).norm()) > 0.99 * NOISELESS.clip_norm


def test_all_examples_of_a_person_count_as_one() -> None:
    gradients = [torch.full((3,), 4.0), torch.full((1,), 3.0)]
    clipped = clip(gradients, 1.0)
    assert float(torch.cat(clipped).norm()) == pytest.approx(1.0, rel=1e-5)
    assert torch.allclose(clipped[0] / clipped[1][0], torch.full((3,), 4 / 3))
    small = [torch.tensor([0.1, 0.2])]
    assert torch.equal(clip(small, 1.0)[0], small[0])


def test_the_noise_is_as_large_as_was_accounted_for() -> None:
    privacy = replace(NOISELESS, noise_multiplier=3.0)
    steps = PrivateSteps(None, {}, privacy, rng=np.random.default_rng(1))  # type: ignore[arg-type]
    (noised,) = steps.noised_mean([torch.zeros(200, 500)])
    # σC / expected people, of every number.
    assert float(noised.std()) == pytest.approx(3.0 * 0.5 / 4, rel=0.01)
    assert abs(float(noised.mean())) < 3 * 3.0 * 0.5 / 4 / math.sqrt(100_000)


def test_noise_is_added_even_where_nobody_is_drawn() -> None:
    quiet = sums({1: 1.0}, replace(NOISELESS, sampling_rate=1e-12, noise_multiplier=1.0))
    assert float(quiet.abs().min()) > 0


def test_neither_people_nor_noise_can_be_drawn_again_from_the_run_s_seed() -> None:
    privacy = replace(NOISELESS, noise_multiplier=1.0)
    one, two = (PrivateSteps(None, {}, privacy).noised_mean([torch.zeros(8)])[0] for _ in range(2))  # type: ignore[arg-type]
    assert not torch.equal(one, two)


def test_people_are_drawn_one_by_one() -> None:
    names = [str(i) for i in range(50)]
    rng = np.random.default_rng(2)
    draws = [draw(names, 0.1, rng) for _ in range(4000)]
    counts = np.array([len(d) for d in draws])
    assert counts.mean() == pytest.approx(5, abs=0.15)
    assert counts.var() == pytest.approx(50 * 0.1 * 0.9, rel=0.1)  # binomial: not a fixed number of people
    assert counts.min() == 0
    each = np.array([sum(name in d for d in draws) for name in names]) / 4000
    assert np.abs(each - 0.1).max() < 0.03
    together = sum("1" in d and "2" in d for d in draws) / 4000
    assert together == pytest.approx(0.01, abs=0.006)


# -- the account -------------------------------------------------------------------------------------


def test_the_account_is_that_of_known_mechanisms() -> None:
    # One Gaussian mechanism without sampling: δ(ε) has a closed form (Balle and Wang 2018, theorem 8).
    sigma, epsilon = 2.0, 1.0
    phi = lambda x: 0.5 * math.erfc(-x / math.sqrt(2))  # noqa: E731
    a, b = 1 / (2 * sigma), epsilon * sigma
    delta = phi(a - b) - math.exp(epsilon) * phi(-a - b)
    assert epsilon_spent(sigma, delta, rate=1.0, steps=1) == pytest.approx(epsilon, rel=0.01)
    # Four with twice the noise are one.
    assert epsilon_spent(2 * sigma, delta, rate=1.0, steps=4) == pytest.approx(epsilon, rel=0.01)


def test_the_noise_keeps_to_the_budget_and_not_far_below() -> None:
    for epsilon in (1.0, 8.0):
        noise = noise_for(epsilon, 1e-4, rate=0.1, steps=50)
        assert 0.97 * epsilon < epsilon_spent(noise, 1e-4, rate=0.1, steps=50) <= epsilon
    assert epsilon_spent(1.0, 1e-4, rate=0.1, steps=50) < epsilon_spent(1.0, 1e-4, rate=0.1, steps=100)


def test_a_budget_is_spent_over_all_steps() -> None:
    privacy = Budget(3.0, people_per_step=10).privacy(people=95, epochs=3)
    assert privacy.steps == 30 and privacy.sampling_rate == pytest.approx(10 / 95)
    assert privacy.delta == pytest.approx(0.1 / 95)
    told = privacy.to_json()
    assert 2.9 < told["epsilon_spent"] <= 3.0
    assert told["noise_multiplier"] == privacy.noise_multiplier and told["clip_norm"] == 1.0


@pytest.mark.parametrize("delta", [0.02, 0.01])
def test_a_delta_that_could_publish_someone_is_refused(delta: float) -> None:
    with pytest.raises(InvalidInput, match=r"below 0\.01"):
        Budget(1.0, delta).privacy(people=100, epochs=1)


@pytest.mark.parametrize(
    "values",
    [
        {"epsilon": 0.0},
        {"epsilon": math.inf},
        {"epsilon": 1e4},
        {"epsilon": 1.0, "delta": 0.0},
        {"epsilon": 1.0, "clip_norm": 0.0},
        {"epsilon": 1.0, "people_per_step": 0},
    ],
)
def test_budgets_that_promise_nothing(values: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput):
        Budget(**values)


# -- runs --------------------------------------------------------------------------------------------


@pytest.fixture
def make_request(model_folder: Callable[[str], Path], tmp_path: Path) -> Callable[..., CollectiveRequest]:
    data, public = write_toy(tmp_path / "news", users=30, items=4), write_toy(tmp_path / "public", users=4)

    def make(**changes: Any) -> CollectiveRequest:
        given = {"data": data, "model": str(model_folder("llama")), "out": tmp_path / "out"}
        small = {
            "layers": (1,),
            "collective_rank": 1,
            "personal_rank": 1,
            "device_epochs": None,
            "threads": 1,
        }
        private = {"validation": public, "budget": Budget(8.0)}
        return small_request(**{**given, **small, **private, **changes})

    return make


def test_a_private_run_tells_its_account_and_nothing_of_its_data(make_request: Any) -> None:
    request = make_request()
    artefact = train_collective(request)
    card = artefact.card
    mechanism = card["privacy"]["mechanism"]
    assert mechanism["people"] == 30 and mechanism["epsilon"] == 8.0 and mechanism["steps"] == 20
    assert mechanism["epsilon_spent"] <= 8.0 and mechanism["delta"] < 1 / 30
    assert set(card["data"]) == {
        "source",
        "rows",
        "users",
        "token_cap",
        "validation_users",
        "validation_examples",
    }
    assert card["losses"]["train_last"] is None and not card["trials"]
    assert card["speed"]["tokens_per_second"] == 0
    text = (request.out / "CARD.md").read_text("utf-8")
    assert "differential privacy by person: epsilon 8, delta 0.0033" in text
    assert "Every enrolled device can recover φ₁" in text
    # R is as drawn from the public seed; W and b moved.
    start = ShiftTensors.identity(artefact.spec, 1, 0).layers[1]
    end = artefact.collective.layers[1]
    assert np.array_equal(start.rotation, end.rotation) and not np.array_equal(start.source, end.source)


def test_every_card_says_who_can_hold_what_was_learned(make_request: Any) -> None:
    request = make_request(budget=None, epochs=1)
    card = train_collective(request).card
    assert card["privacy"]["mechanism"] is None
    assert "without differential privacy" in (request.out / "CARD.md").read_text("utf-8")


def test_with_little_noise_a_private_run_learns(make_request: Any) -> None:
    losses = train_collective(
        make_request(budget=Budget(50.0, people_per_step=30), epochs=4, learning_rate=0.1)
    ).card["losses"]
    assert losses["validation"]["seed"] < 0.97 * losses["validation"]["base"]


@pytest.mark.slow
def test_an_interrupted_private_run_goes_on_to_the_same_number_of_steps(make_request: Any) -> None:
    with pytest.raises(Cancelled):
        # Soon: the noise is another in each run, and may end one early.
        train_collective(make_request(), stop=StopAfter(2))
    with pytest.raises(InvalidInput, match="other privacy"):
        train_collective(make_request(budget=Budget(4.0)))
    card = train_collective(make_request()).card
    assert card["hyper_parameters"]["steps"] <= card["privacy"]["mechanism"]["steps"] == 20


def test_what_would_spend_more_than_is_accounted_for_is_refused(make_request: Any) -> None:
    with pytest.raises(InvalidInput, match="give --lr"):
        train_collective(make_request(learning_rate=None))
    with pytest.raises(InvalidInput, match="public examples with --validation"):
        train_collective(make_request(validation=None))
    with pytest.raises(InvalidInput, match="below"):
        train_collective(make_request(budget=Budget(1.0, delta=0.5)))
    with pytest.raises(InvalidInput, match="--accumulate"):
        train_collective(make_request(accumulate=2))


def rewritten(data: Path, change: Callable[[list[dict[str, Any]]], None]) -> Path:
    path = data / "user_others.json"
    records = json.loads(path.read_text())
    change(records)
    path.write_text(json.dumps(records))
    return path


def test_nobody_s_being_there_decides_who_else_is_drawn(make_request: Any) -> None:
    with pytest.raises(InvalidInput, match="leave out --users"):
        train_collective(make_request(users=20))


def test_a_person_is_neither_a_line_nor_a_question(make_request: Any, tmp_path: Path) -> None:
    lines = [{"user_id": n, "text": "a", "title": "b"} for n in range(30)]
    del lines[7]["user_id"]
    path = tmp_path / "lines.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(
        InvalidInput, match=r"lines\.jsonl: 1 lines or questions .* give every line a user_id"
    ):
        train_collective(make_request(data=path))
    path = tmp_path / "questions.json"
    asked = {"input": "article: a", "output": "b", "user_id": 7, "profile": []}
    path.write_text(json.dumps([{"id": str(n), **asked} for n in range(30)]))
    with pytest.raises(InvalidInput, match="30 lines or questions"):
        train_collective(make_request(data=path))


def test_one_person_s_query_does_not_turn_everybody_s_profile_away(make_request: Any, tmp_path: Path) -> None:
    def ask(records: list[dict[str, Any]]) -> None:
        records[3]["query"] = [{"id": "q", "input": "article: a", "gold": "b"}]

    path = rewritten(write_toy(tmp_path / "mixed", users=30, items=4), ask)
    with pytest.raises(InvalidInput, match="29 people have a profile and no query"):
        train_collective(make_request(data=path))


@pytest.mark.slow
def test_how_much_people_wrote_decides_neither_when_to_validate_nor_on_whom_rates_are_tried(
    make_request: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "_PATIENCE", 100)
    monkeypatch.setattr(trials, "LADDER", (1e-3,))
    monkeypatch.setattr(trials, "_FIRST", (1e-3,))
    seen = []
    for items in (4, 40):  # of each of as many people
        data = write_toy(tmp_path / f"{items}", users=30, items=items)
        out = tmp_path / f"out{items}"
        card = train_collective(
            make_request(data=data, out=out, epochs=1, device_epochs=1, device_learning_rate=None)
        ).card
        curve = [step for step, _ in card["losses"]["validation_curve"]]
        seen.append((curve, [trial["users"] for trial in card["device_trials"]]))
    assert seen[0] == seen[1]
    assert len(seen[0][0]) == 9 and set(seen[0][1]) == {4}


def test_the_command_asks_for_epsilon_with_its_options(make_request: Any, tmp_path: Path) -> None:
    from perfit_cloud.cli.collective import app

    request = make_request()
    common = [
        "train",
        "--task",
        request.task,
        "--data",
        str(request.data),
        "--model",
        request.model,
        "--layers",
        "1",
        "--lr",
        "1e-2",
        "--device-lr",
        "1e-2",
        "--epochs",
        "1",
        "--out",
        str(tmp_path / "a"),
    ]
    refused = CliRunner().invoke(app, [*common, "--delta", "1e-3"])
    assert isinstance(refused.exception, InvalidInput) and "belong to --epsilon" in str(refused.exception)
    private = ["--epsilon", "3", "--clip-norm", "0.2", "--people-per-step", "6", "--validation"]
    result = CliRunner().invoke(app, [*common, *private, str(request.validation)])
    assert result.exit_code == 0, result.output
    card = json.loads((tmp_path / "a" / "artefact.json").read_text())["card"]
    assert card["privacy"]["mechanism"]["clip_norm"] == 0.2
    assert card["privacy"]["mechanism"]["sampling_rate"] == pytest.approx(0.2)
