"""GGUF files of tiny random models, written as llama.cpp's converter writes them; nothing is downloaded.

The weights that come back out of a file's blocks are put into the model that it is made from, so that
what is loaded can be compared with it exactly.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind

from tests.support.models import tiny_config, tiny_tokenizer

__all__ = ["QUANTISED", "TEMPLATE", "gguf_model", "write_gguf"]

# The architecture's name in the file, and what transformers reads of the family's own settings.
_FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"sliding_window": None, "layer_types": ["full_attention"] * 4},
    "gemma2": {"query_pre_attn_scalar": 256, "head_dim": 8},
}
_ENDS = {"gemma2": ("<bos>", "<eos>")}  # older transformers look for no other start in Gemma's files
# What the package can make; of the others a test takes blocks of random bytes.
QUANTISED = ("F32", "F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0", "MXFP4", "TQ2_0", "Q4_K", "Q6_K")
_WIDE = {Kind.TQ2_0, Kind.Q4_K, Kind.Q6_K}  # blocks of 256
TEMPLATE = (
    "{% for m in messages %}{{ '[' + m['role'] + ']' + m['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)
Change = Callable[[gguf.GGUFWriter], None]


def gguf_model(family: str, kind: str, **changes: Any) -> Any:
    """The model that a file of this kind is made from; `changes` are of its configuration."""
    from transformers import AutoModelForCausalLM

    wide = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64}
    config = tiny_config(family, len(tiny_tokenizer()))
    config.update(
        {"initializer_range": 0.1} | _FAMILIES[family] | (wide if Kind[kind] in _WIDE else {}) | changes
    )
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    model.requires_grad_(False)
    for name, weight in model.named_parameters():
        if "norm" in name or name.endswith("bias"):  # neither ones nor zeros, so that they show
            weight.add_(0.2 * torch.randn_like(weight))
    return model


def write_gguf(
    path: Path, model: Any, kind: str, *, change: Change | None = None, tokens: bool = True
) -> Path:
    """Write it, and put into the model what the blocks hold. `change` may add to the metadata."""
    config = model.config
    writer = gguf.GGUFWriter(path, config.model_type)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if config.model_type == "gemma2":
        writer.add_key_length(config.head_dim)
        writer.add_sliding_window(config.sliding_window)
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    else:
        writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    if tokens:
        _add_tokenizer(writer, _ENDS.get(config.model_type, ("<s>", "</s>")))
    if change is not None:
        change(writer)
    for name, array, in_blocks in _tensors(model, Kind[kind]):
        writer.add_tensor(name, array, raw_dtype=Kind[kind] if in_blocks else Kind.F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_tokenizer(writer: gguf.GGUFWriter, ends: tuple[str, str]) -> None:
    tokenizer = tiny_tokenizer()
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([*ends, *tokens[2:]])
    writer.add_token_types([3 if token in tokenizer.all_special_tokens else 1 for token in tokens])
    # Gemma's files have these two; older transformers read its tokenizer by them.
    writer.add_token_scores([-float(at) for at in range(len(tokens))])
    writer.add_unk_token_id(2)
    writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(True)
    writer.add_chat_template(TEMPLATE.replace("</s>", ends[1]))


def _tensors(model: Any, kind: Kind) -> Iterator[tuple[str, np.ndarray, bool]]:
    """(name, what the file holds, whether in blocks) of each weight."""
    config = model.config
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[config.model_type.upper()], config.num_hidden_layers)
    rng = np.random.default_rng(0)
    tied = config.tie_word_embeddings
    for name, weight in model.named_parameters():
        if tied and name == "lm_head.weight":
            continue
        stored = weight.numpy().copy()
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        count = next((heads[key] for key in heads if f"{key}." in name), 0)
        if config.model_type == "llama" and count:
            stored = _interleaved(stored, count)
        if config.model_type == "gemma2" and "norm" in name:
            stored = stored + 1
        in_blocks = stored.ndim == 2
        if in_blocks:
            stored = _blocks(stored, kind, rng)
            held = gguf.dequantize(stored, kind)
            weight.copy_(
                torch.from_numpy(_halves(held, count) if config.model_type == "llama" and count else held)
            )
        yield names.get_name(name, try_suffixes=(".weight", ".bias")), stored, in_blocks


def _blocks(weights: np.ndarray, kind: Kind, rng: np.random.Generator) -> np.ndarray:
    try:
        return gguf.quantize(weights, kind)
    except NotImplementedError:  # then any bytes will do, with scales of a size that suits weights
        size, width = gguf.GGML_QUANT_SIZES[kind]
        raw = rng.integers(0, 256, (weights.size // size, width), dtype=np.uint8)
        scale = np.frombuffer(np.float16(1e-4).tobytes(), np.uint8)
        for at in (0, 2) if kind is Kind.Q4_K else (width - 2,):
            raw[:, at : at + 2] = scale
        return raw.reshape(len(weights), -1)


def _interleaved(weights: np.ndarray, heads: int) -> np.ndarray:
    """Rows as llama.cpp rotates them: pairs beside each other."""
    return weights.reshape(heads, 2, -1, weights.shape[-1]).swapaxes(1, 2).reshape(weights.shape)


def _halves(weights: np.ndarray, heads: int) -> np.ndarray:
    """Rows as transformers rotates them: the second of each pair in the second half."""
    return weights.reshape(heads, -1, 2, weights.shape[-1]).swapaxes(1, 2).reshape(weights.shape)
