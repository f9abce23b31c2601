"""Artefacts without collective data: they change (almost) nothing, and a personal shift learns on them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.support.generation import SMALL, alone, prompts, serve
from tests.support.models import needs_smollm2
from typer.testing import CliRunner

from perfit_cloud.cli.main import app
from perfit_cloud.collective.blank import RATE, START, BlankRequest, make_blank
from perfit_cloud.collective.encoding import Encoder
from perfit_cloud.engine.generation.continuous import GenerationEngine
from perfit_cloud.engine.gradients.stateless import GradientEngine
from perfit_cloud.engine.interface import ShiftUse
from perfit_cloud.model.artefacts import Artefact
from perfit_cloud.model.base import BaseModel, load_base
from perfit_cloud.model.interventions import phi, to_torch
from perfit_shared.errors import InvalidData, InvalidInput, NotFound
from perfit_shared.optimizer import OptimizerConfig, StiefelAdamW
from perfit_shared.shifts import ShiftTensors
from perfit_shared.types import Mode, Sampling


@pytest.fixture
def request_for(tmp_path: Path) -> Callable[..., BlankRequest]:
    def make(**changes: Any) -> BlankRequest:
        return replace(BlankRequest("chat", "llama", tmp_path / "out", positions="f2+l3"), **changes)

    return make


@pytest.fixture
def blank(request_for: Callable[..., BlankRequest], base: BaseModel) -> Artefact:
    return make_blank(request_for(), base=base)


def test_the_collective_shift_and_a_zero_one_change_no_token(base: BaseModel, blank: Artefact) -> None:
    zero = ShiftTensors.identity(blank.spec, blank.spec.personal_rank, seed=3)
    uses = [ShiftUse(Mode.COLLECTIVE, blank), ShiftUse(Mode.PERSONAL, blank, zero)]
    wanted = [(prompt, use, Sampling(8, temperature=0)) for prompt in prompts(6) for use in uses]
    engine = GenerationEngine(base, {blank.name: blank}, SMALL)
    try:
        answers = serve(engine, wanted)
    finally:
        engine.stop()
    assert answers == [alone(base, prompt, ShiftUse(Mode.BASE), 8) for prompt, _, _ in wanted]
    states = torch.randn(1, 50, base.hidden_size)
    for shift in to_torch(blank.collective, base.device).values():
        assert torch.equal(phi(states, shift), states)


def test_the_seed_moves_states_by_little(base: BaseModel, blank: Artefact) -> None:
    states = torch.randn(1, 200, base.hidden_size)
    for shift in to_torch(blank.seed, base.device).values():
        moved = (phi(states, shift) - states).norm(dim=-1) / states.norm(dim=-1)
        assert 0.5 * START < moved.mean() < 2 * START
    pair = ([0, 7, 8, 9, 10, 11], [20, 21, 1])
    engine = GradientEngine(base)
    try:
        plain, moved = (engine.score([pair], use)[0] for use in uses(blank))
    finally:
        engine.close()
    assert 0 < abs(moved.log_likelihood - plain.log_likelihood) < 0.05


def uses(blank: Artefact) -> tuple[ShiftUse, ShiftUse]:
    return ShiftUse(Mode.COLLECTIVE, blank), ShiftUse(Mode.PERSONAL, blank, blank.seed)


def learned(
    base: BaseModel, blank: Artefact, examples: list[tuple[str, str]], *, steps: int, rate: float
) -> tuple[float, float]:
    """Loss on the second half before and after an update from the first half, as a device steps."""
    encoder = Encoder(base, blank.task)
    pairs = [found.pair for example in examples if (found := encoder.encode(*example))]
    half = len(pairs) // 2
    engine, tensors = GradientEngine(base), blank.seed
    optimizer = StiefelAdamW(OptimizerConfig(rate, steps))

    def loss() -> float:
        return engine.gradient(pairs[half:], ShiftUse(Mode.PERSONAL, blank, tensors)).loss

    try:
        before = loss()
        for step in range(steps):
            gradient = engine.gradient(pairs[:half], ShiftUse(Mode.PERSONAL, blank, tensors))
            if not step:
                for name, values in gradient.tensors.named():
                    assert np.abs(values).max() > 0, name
            tensors = optimizer.step(tensors, gradient.tensors)
        return before, loss()
    finally:
        engine.close()


REPLIES = [
    (f"are you {doing} {when}?", f"yes {when}, my dear")
    for doing in ("there", "coming", "at home", "well")
    for when in ("today", "on monday", "at noon", "this week")
]


def test_an_update_from_it_learns(base: BaseModel, blank: Artefact) -> None:
    before, after = learned(base, blank, REPLIES, steps=40, rate=1e-2)
    assert after < 0.93 * before


@pytest.mark.slow
@needs_smollm2
def test_an_update_from_it_learns_on_smollm2(tmp_path: Path) -> None:
    base = load_base("smollm2", dtype="float32")
    blank = make_blank(BlankRequest("chat", "smollm2", tmp_path / "out"), base=base)
    assert blank.spec.layers == (5, 8, 11)
    before, after = learned(base, blank, REPLIES, steps=12, rate=RATE)
    assert after < 0.8 * before


def test_the_card_says_what_it_is(blank: Artefact, tmp_path: Path) -> None:
    page = (tmp_path / "out" / "CARD.md").read_text()
    for says in ("No collective data", "(seed 0)", "no figures", f"{RATE:g}", "It is the default"):
        assert says in page
    assert Artefact.load(tmp_path / "out").version == blank.version
    assert blank.learning_rate == RATE and blank.card["data"] is None


def test_what_is_given_replaces_the_preset_s(request_for: Any, base: BaseModel) -> None:
    made = make_blank(
        request_for(layers=(1, 3), personal_rank=5, epochs=2, batch_size=7, learning_rate=3e-3, seed=4),
        base=base,
    )
    assert (made.spec.layers, made.spec.personal_rank, made.spec.collective_rank) == ((1, 3), 5, 1)
    assert (made.epochs, made.batch_size, made.learning_rate) == (2, 7, 3e-3)
    other = make_blank(request_for(layers=(1, 3), personal_rank=5, force=True), base=base)
    assert other.seed.digest() != made.seed.digest()
    assert "It was given" not in other.card["learning_rate_note"]


def test_a_folder_s_task_is_taken(request_for: Any, base: BaseModel, tmp_path: Path) -> None:
    (tmp_path / "task.json").write_text(json.dumps({"answer": "{reply}!"}))
    assert make_blank(request_for(data=tmp_path), base=base).task.answer == "{reply}!"
    own = {"task": "diary", "template": "{day}", "answer": "{entry}", "metric": "rouge_1"}
    (tmp_path / "task.json").write_text(json.dumps(own))
    diary = make_blank(request_for(task="diary", data=tmp_path, force=True), base=base)
    assert diary.card["hyper_parameters"]["preset"] == "chat", "whose figures an open task takes"
    (tmp_path / "task.json").write_text("[")
    with pytest.raises(InvalidData, match=r"task\.json"):
        make_blank(request_for(data=tmp_path, force=True), base=base)


def test_what_cannot_be_is_refused_and_a_finished_artefact_stays(
    request_for: Any, blank: Artefact, base: BaseModel, tmp_path: Path
) -> None:
    with pytest.raises(InvalidInput, match="--force to replace it"):
        make_blank(request_for(seed=9), base=base)
    for wrong, error in (
        ({"learning_rate": 1.5}, InvalidInput),
        ({"epochs": 0}, InvalidInput),
        ({"batch_size": -1}, InvalidInput),
        ({"layers": (99,)}, InvalidInput),
        ({"personal_rank": 0}, InvalidInput),
        ({"preset": "none"}, NotFound),
        ({"task": "none"}, NotFound),
    ):
        with pytest.raises(error):
            make_blank(request_for(force=True, **wrong), base=base)
    assert Artefact.load(tmp_path / "out").version == blank.version
    assert make_blank(request_for(seed=9, force=True), base=base).version != blank.version


def test_the_command(model_folder: Callable[[str], Path], tmp_path: Path) -> None:
    words = ["collective", "blank", "--task", "chat", "--model", str(model_folder("llama"))]
    done = CliRunner().invoke(app, [*words, "--out", str(tmp_path / "a"), "--layers", "1;2", "--json"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["version"] == Artefact.load(tmp_path / "a").version
    assert told["device_learning_rate"] == RATE
