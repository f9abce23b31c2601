"""A family that vLLM has no model of its own for, through its transformers backend."""

from __future__ import annotations

import pytest
import torch

from perfit_cloud.engine.generation.vllm.engine import VllmEngine
from perfit_cloud.model.base import BaseModel, load_base
from perfit_shared.types import Sampling
from tests.support.engine_subject import SMALL, endless
from tests.support.generation import NEW, alone, prompts, serve, uses
from tests.support.models import random_artefact, tiny_tokenizer


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    from transformers import HeliumConfig, HeliumForCausalLM
    from vllm import ModelRegistry

    assert "HeliumForCausalLM" not in ModelRegistry.get_supported_archs()
    folder, words = tmp_path_factory.mktemp("helium"), tiny_tokenizer()
    torch.manual_seed(1)
    config = HeliumConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=256,
        initializer_range=0.3,
        vocab_size=len(words),
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    HeliumForCausalLM(config).save_pretrained(folder)
    words.save_pretrained(folder)
    return endless(load_base(str(folder), dtype="float32"))


def test_answers_are_those_of_single_hooked_passes_by_the_library_s_own_classes(base: BaseModel) -> None:
    """Of mixed users and modes; the library's class, which both models are of, works on as before."""
    first = random_artefact(base)
    second = random_artefact(base, "chat", positions="s1+f1+l4", layers=(0, 2, 3), seed=9, ranks=(4, 5))
    artefacts = {each.name: each for each in (first, second)}
    asked = [
        (prompt, use, Sampling(NEW)) for prompt, use in zip(prompts(12), uses(artefacts, 12), strict=True)
    ]
    before = type(base.model.model).__call__
    engine = VllmEngine(base, artefacts, SMALL)
    try:
        served = serve(engine, asked)
    finally:
        engine.stop()
    assert type(base.model.model).__call__ is before
    assert served == [alone(base, prompt, use) for prompt, use, _ in asked]
