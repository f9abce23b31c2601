"""Who leaves the engine to perfit gets vLLM where it takes the model."""

from __future__ import annotations

from typing import Any

import pytest

from perfit_cloud.engine.generation.continuous import GenerationEngine
from perfit_cloud.engine.generation.factory import engine_kind
from perfit_cloud.engine.generation.static import BatchedEngine
from perfit_cloud.engine.generation.vllm.engine import VllmEngine
from perfit_cloud.engine.interface import GenerationSettings
from perfit_shared.errors import InvalidData
from tests.support.models import build


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
def test_vllm_where_it_takes_the_model(family: str, load: Any) -> None:
    assert engine_kind(load(family)) is VllmEngine
    assert engine_kind(load(family), "own") is GenerationEngine


def test_our_own_for_heads_that_its_attention_does_not_have() -> None:
    assert engine_kind(build("llama", width=8)) is GenerationEngine


def test_our_own_for_families_that_vllm_was_not_shown_on() -> None:
    assert engine_kind(build("falcon", width=32)) is BatchedEngine


def test_our_own_for_quantised_weights() -> None:
    base = build("llama", width=32)
    base.model.config.quantization_config = {"quant_method": "bitsandbytes"}
    try:
        assert engine_kind(base) is GenerationEngine
    finally:
        del base.model.config.quantization_config


def test_its_copy_of_the_weights_is_counted_where_it_is_in_this_process() -> None:
    base = build("llama", width=32)
    size = sum(weight.nbytes for weight in base.model.parameters())
    assert VllmEngine.weight_bytes(base, 1) == size > 0
    assert VllmEngine.weight_bytes(base, 2) == 0


def test_our_own_for_what_vllm_refuses_and_says_so_when_told_to() -> None:
    base = build("qwen2", width=32)
    assert engine_kind(base) is GenerationEngine
    with pytest.raises(InvalidData, match=r"vLLM does not take .*set engine to own"):
        VllmEngine(base, {}, GenerationSettings(512, 64, 4))
