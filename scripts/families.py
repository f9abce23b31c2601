"""Tiny random models of every family of causal LM that transformers has, and what each of them can do here.

python scripts/families.py docs/models.md      writes the table behind its heading
python scripts/families.py rwkv minimax        prints theirs
"""

from __future__ import annotations

import inspect
import logging
import sys
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging as hf_logging

from perfit_cloud.engine.generation.continuous import can_share
from perfit_cloud.model.base import BaseModel
from perfit_cloud.model.capabilities import try_model
from perfit_cloud.model.partial import supports
from perfit_shared.errors import InvalidData

__all__ = ["FAMILIES", "tiny_config", "tiny_model"]

_HEADING = "float32, CPU).\n"
# Whatever a configuration calls a size, it is small; names that a family does not know are left out.
_NAMES: dict[float, str] = {
    0: "bos_token_id num_kv_shared_layers",
    0.3: "initializer_range init_std",
    1: "eos_token_id n_shared_experts n_group topk_group mamba_n_groups mamba_ngroups num_memory_blocks "
    "num_encoder_layers",
    2: "pad_token_id num_key_value_heads num_kv_heads num_global_key_value_heads o_groups "
    "linear_num_key_heads index_n_heads altup_num_inputs mamba_expand hc_mult num_experts_per_tok moe_topk",
    4: "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_decoder_layers "
    "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads "
    "linear_num_value_heads num_experts n_routed_experts num_local_experts time_step_rank rotary_dim "
    "laurel_rank index_topk",
    8: "head_dim dim_head attention_head_size global_head_dim index_head_dim qk_rope_head_dim "
    "qk_nope_head_dim v_head_dim linear_key_head_dim linear_value_head_dim ssm_state_size state_size "
    "mamba_d_state o_lora_rank mamba_n_heads mamba_d_head mamba_num_heads mamba_head_dim n_mamba_heads "
    "hidden_size_per_layer_input",
    16: "q_lora_rank kv_lora_rank qk_head_dim router_hidden_size attention_window_size sliding_window",
    32: "hidden_size n_embd d_model dim_model hidden_dim embedding_size emb_dim lru_width "
    "moe_intermediate_size shared_expert_intermediate_size word_embed_proj_dim",
    64: "intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim n_inner dim_ff dff mamba_d_ssm",
    128: "max_position_embeddings n_positions max_seq_len context_length",
}
# A head wider than the embedding would answer with tokens that cannot be read again.
_VOCABULARIES = ("vocab_size", "unpadded_vocab_size", "vocab_size_per_layer_input")
_SIZES: dict[str, Any] = {name: size for size, names in _NAMES.items() for name in names.split()}
_LATENT = {"num_key_value_heads": 4, "head_dim": None}  # heads of their own sizes
_DECODER = {"is_decoder": True}  # of families that read both ways unless told
_OWN: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        (
            "axk1",
            "axk2",
            "deepseek_v2",
            "deepseek_v3",
            "deepseek_v32",
            "glm4_moe_lite",
            "glm_moe_dsa",
            "longcat_flash",
            "minicpm3",
            "youtu",
        ),
        _LATENT,
    ),
    **dict.fromkeys(
        (
            "bert",
            "bert-generation",
            "camembert",
            "data2vec-text",
            "electra",
            "ernie",
            "megatron-bert",
            "rembert",
            "roberta",
            "roberta-prelayernorm",
            "roformer",
            "xlm-roberta",
            "xlm-roberta-xl",
        ),
        _DECODER,
    ),
    "bamba": {"attn_layer_indices": [1, 3]},
    "big_bird": {**_DECODER, "attention_type": "original_full"},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10_000.0, "clip_qkv": 8},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v4": {"compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8}},
    "gemma3n_text": {
        "activation_sparsity_pattern": [0.0] * 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "gpt2": {"num_key_value_heads": None},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": 8},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8, "n_groups": 1},
    "minimax": {"block_size": 8, "layer_types": ["linear_attention"] * 3 + ["full_attention"]},
    "moshi": {"num_codebooks": 2},
    "recurrent_gemma": {"num_key_value_heads": 1},
    "reformer": {
        **_DECODER,
        "attn_layers": ["local", "lsh"] * 2,
        "axial_pos_embds_dim": [16, 16],
        "axial_pos_shape": [8, 16],
        "num_buckets": 4,
    },
    "roc_bert": {
        **_DECODER,
        "pronunciation_vocab_size": 16,
        "shape_vocab_size": 16,
        "pronunciation_embed_dim": 8,
        "shape_embed_dim": 8,
    },
    "xlm": {"causal": True, "is_encoder": False},
    "xlnet": {"d_inner": 64, "d_head": 8},
    "xlstm": {"num_heads": 2, "hidden_size": 64, "chunk_size": 16, "embedding_dim": 64},
    "xmod": {**_DECODER, "default_language": "en_XX"},
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "attention_head_dim": 16,
        "num_key_value_heads": 4,
    },
    "zaya": {"num_experts_per_tok": 1},
}
# Made of several models, most of them for pictures or sound; or an assistant of another model.
_NOT_TRIED = frozenset(
    {
        "blt",
        "dots3_note",
        "emu3",
        "fuyu",
        "gemma3",
        "gemma3n",
        "gemma4",
        "gemma4_assistant",
        "gemma4_unified",
        "gemma4_unified_assistant",
        "git",
        "got_ocr2",
        "llama4",
        "mllama",
        "moss_transcribe_diarize",
        "musicgen",
        "musicgen_melody",
        "phi4_multimodal",
        "qwen3_5",
        "qwen3_5_moe",
        "qwen4_exp",
        "trocr",
        "whisper",
    }
)
FAMILIES = tuple(name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name not in _NOT_TRIED)


def tiny_config(family: str, vocabulary: int = 64, **more: Any) -> Any:
    """Four blocks of 32 or so. Raises what the family's configuration raises."""
    kind = CONFIG_MAPPING[family]
    known = set(inspect.signature(kind.__init__).parameters)
    other_names = getattr(kind, "attribute_map", {})
    sizes = {**_SIZES, **dict.fromkeys(_VOCABULARIES, vocabulary)}
    values = {name: value for name, value in sizes.items() if name in known}
    for name, value in sizes.items():
        if other_names.get(name) in known:
            values.setdefault(other_names[name], value)
    values |= _OWN.get(family, {}) | more
    if "audio_vocab_size" in known:
        values["audio_vocab_size"] = vocabulary
    return kind(**{name: value for name, value in values.items() if value is not None})


def tiny_model(family: str, vocabulary: int = 64, **more: Any) -> Any:
    """A random model in eval mode, always the same one, no parameter wanting a gradient."""
    torch.manual_seed(0)
    return (
        AutoModelForCausalLM.from_config(tiny_config(family, vocabulary, **more)).eval().requires_grad_(False)
    )


class Row(NamedTuple):
    """How a family is run, in words of docs/models.md."""

    answers: str
    passes: str
    steps: str


def row_of(family: str) -> Row | str:
    """How it is run, or why it is not."""
    try:
        model = tiny_model(family)
    except Exception as error:
        return f"not tried: no tiny one can be made ({type(error).__name__})"
    try:
        base = BaseModel(family, "", model, None, try_model(model))
    except InvalidData as error:
        return f"refused: {error}"
    able = base.capabilities
    answers = "continuous batch" if can_share(base) else f"batch, {able.answers.value}"
    if not able.caches:
        answers += ", without a cache"
    steps = "from cached activations" if supports(model) else "in full"
    return Row(answers, able.passes.value, steps)


def table(families: tuple[str, ...] = FAMILIES) -> str:
    """Markdown: families that are run alike in one row, and the others with their reasons."""
    alike: dict[Row | str, list[str]] = {}
    for family in families:
        alike.setdefault(row_of(family), []).append(f"`{family}`")
    lines = ["| answers | scores and gradients | steps of an update | families |", "|---|---|---|---|"]
    rows = [(row, names) for row, names in alike.items() if isinstance(row, Row)]
    for row, names in sorted(rows, key=lambda pair: -len(pair[1])):
        lines.append(f"| {' | '.join(row)} | {', '.join(names)} |")
    others = [(why, names) for why, names in alike.items() if isinstance(why, str)]
    lines += ["", *(f"- {', '.join(names)}: {why}" for why, names in sorted(others))]
    return "\n".join(lines) + "\n"


def main(arguments: list[str]) -> None:
    warnings.filterwarnings("ignore")
    hf_logging.set_verbosity_error()
    logging.getLogger("transformers").setLevel(logging.CRITICAL)
    paths = [argument for argument in arguments if argument.endswith(".md")]
    families = tuple(argument for argument in arguments if argument not in paths) or FAMILIES
    made = table(families)
    if not paths:
        print(made)
    for path in map(Path, paths):
        text = path.read_text("utf-8")
        path.write_text(text[: text.index(_HEADING) + len(_HEADING)] + "\n" + made, "utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
