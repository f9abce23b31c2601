"""A model behind the engines, against the same model alone: whatever form its weights came in."""

from __future__ import annotations

from typing import Any

from perfit_cloud.engine.generation.factory import build_engine
from perfit_cloud.engine.gradients.stateless import GradientEngine
from perfit_cloud.engine.interface import ShiftUse
from perfit_cloud.model.base import BaseModel
from perfit_shared.types import Mode, Sampling
from tests.support.generation import NEW, SMALL, alone, prompts, serve, uses
from tests.support.gradients import OF_TOKENIZER, assert_equal, autograd, person

__all__ = ["assert_as_alone"]


def assert_as_alone(base: BaseModel, artefact: Any) -> None:
    """Answers of several users together, and a gradient, in float32."""
    whose = uses({"one": artefact, "same": artefact}, 6)
    asked = [(prompt, use, Sampling(NEW)) for prompt, use in zip(prompts(6), whose, strict=True)]
    engine, gradients = build_engine(base, {artefact.name: artefact}, SMALL), GradientEngine(base)
    try:
        assert serve(engine, asked) == [alone(base, prompt, use) for prompt, use, _ in asked]
        mine = person(artefact, 3)
        got = gradients.gradient(OF_TOKENIZER, ShiftUse(Mode.PERSONAL, artefact, mine))
    finally:
        engine.stop()
        gradients.close()
    assert_equal(got, autograd(base, artefact, mine, OF_TOKENIZER))
