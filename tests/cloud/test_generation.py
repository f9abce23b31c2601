"""The continuous batch: which models share one, whose prompts are read first, and when it gives up."""

from __future__ import annotations

from typing import Any

import pytest
from tests.support.engine_subject import POISON, fragile
from tests.support.generation import NEW, SMALL, alone, prompts, serve, uses
from tests.support.models import FAMILIES
from tests.support.waiting import wait_for

from perfit_cloud.engine.device_lock import DeviceLock
from perfit_cloud.engine.generation.continuous import GenerationEngine, can_share
from perfit_cloud.engine.generation.factory import engine_kind
from perfit_cloud.engine.gradients.stateless import GradientEngine
from perfit_cloud.engine.interface import GenerationSettings, ShiftUse
from perfit_cloud.model.base import BaseModel
from perfit_cloud.model.kv_cache import KVCache
from perfit_shared.errors import ConfigError, Unavailable
from perfit_shared.types import Mode, Sampling


@pytest.mark.parametrize("name", FAMILIES)
def test_which_families_share_a_batch(name: str, load: Any) -> None:
    """Falcon's attention does not go through the library's interface; it is served all the same."""
    assert engine_kind(load(name)).continuous == (name != "falcon")


def test_there_is_no_engine_of_an_unknown_name(load: Any) -> None:
    assert engine_kind(load("llama"), "own") is engine_kind(load("llama"), "auto") is GenerationEngine
    with pytest.raises(ConfigError, match="auto, own"):
        engine_kind(load("llama"), "another")


@pytest.mark.parametrize("name", ["auto", "own"])
def test_only_vllm_divides_blocks_among_workers(name: str, load: Any) -> None:
    with pytest.raises(ConfigError, match="tensor_parallel"):
        engine_kind(load("llama"), name, 2)


def test_a_long_prompt_and_short_ones_keep_nobody_waiting(load: Any) -> None:
    """Short prompts that come behind a long one are answered first."""
    device_lock = DeviceLock()
    engine = GenerationEngine(load("llama"), {}, GenerationSettings(2048, 16, 16), device_lock)
    left: list[int] = []  # answers under way after each pass

    def count(*_: object) -> None:
        left.append(engine.health().in_flight)
        if left[-1] == 1:  # when the last one leaves now, it was the long one
            long.cancel()
            left.append(engine.health().in_flight)

    device_lock.on_pass = count
    with device_lock.hold():
        long = engine.submit([0] * 240, ShiftUse(Mode.BASE), Sampling(1))
        short = [engine.submit([0, 5, 6, 7], ShiftUse(Mode.BASE), Sampling(1)) for _ in range(12)]
    try:
        assert all(list(answer)[-1].finish for answer in short)
        wait_for(lambda: bool(left) and left[-1] == 0)
    finally:
        engine.stop()
    assert left[left.index(1) + 1] == 0


def test_an_engine_that_cannot_forget_stops(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """After an error of the device itself nothing works any more: readers and callers must hear of it."""

    def broken(*_: Any) -> Any:
        raise RuntimeError("device-side assert")

    monkeypatch.setattr(KVCache, "clear", broken)
    engine = GenerationEngine(fragile(load("llama")), {}, SMALL)
    with pytest.raises(Unavailable):
        list(engine.submit([0, 5, POISON], ShiftUse(Mode.BASE), Sampling(4)))
    wait_for(lambda: not engine.health().is_alive)
    with pytest.raises(Unavailable):
        engine.submit([0, 5, 6], ShiftUse(Mode.BASE), Sampling(4))


@pytest.mark.parametrize("window", [10, 200])
@pytest.mark.parametrize("kind", ["qwen2_moe", "phimoe"])
def test_a_family_that_hides_its_window_in_the_mask_is_not_packed(kind: str, window: int) -> None:
    """Such a block does not tell its attention of it, which would look back over everything.

    The trial itself shows a window of 10; one of 200 is longer than its prompts.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        kind,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=100,
        max_position_embeddings=256,
        sliding_window=window,
        use_sliding_window=True,
        max_window_layers=2,
        initializer_range=0.3,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    assert not can_share(BaseModel("tiny", "", model, None))


def test_the_order_of_the_engines_does_not_matter(load: Any, make_artefact: Any) -> None:
    base = load("llama")
    artefacts = {"news_headline": make_artefact(base)}
    gradients = GradientEngine(base)  # its hooks must not be copied into the serving twin
    engine = GenerationEngine(base, artefacts, SMALL)
    use = uses(artefacts | {"again": artefacts["news_headline"]}, 3)[2]
    try:
        assert serve(engine, [(prompts(7)[6], use, Sampling(NEW))])[0] == alone(base, prompts(7)[6], use)
    finally:
        engine.stop()
        gradients.close()
