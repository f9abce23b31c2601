"""Finds the decoder of a causal LM, and the decoder's blocks."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from perfit_shared.errors import InvalidData

__all__ = ["block_list", "context_of", "decoder_of", "depends_on_length", "hidden_of", "with_hidden"]


def decoder_of(model: Any) -> Any:
    """The module between token ids and head, which has the blocks. Raises InvalidData without such."""
    # Some families call their head "decoder", and the library takes it for one.
    for module in (model.get_decoder(), model.base_model, model):
        if _blocks_in(module, model) is not None:
            return module
    raise InvalidData("no list of decoder blocks found in this model")


def block_list(model: Any) -> nn.ModuleList:
    """The decoder's blocks. Raises InvalidData for a model that has no such list."""
    found = _blocks_in(decoder_of(model), model)
    if found is None:
        raise InvalidData("no list of decoder blocks found in this model")
    return found


def _blocks_in(module: nn.Module, model: Any) -> nn.ModuleList | None:
    count = model.config.get_text_config().num_hidden_layers
    lists = (m for m in module.modules() if isinstance(m, nn.ModuleList) and len(m) == count)
    return next(lists, None)


def hidden_of(output: Any) -> Tensor:
    """The hidden state in what a block gives: that alone, or the first of several."""
    hidden: Tensor = output[0] if isinstance(output, tuple | list) else output
    return hidden


def with_hidden(output: Any, hidden: Tensor) -> Any:
    """What a block gives, with another hidden state."""
    if isinstance(output, list):
        return [hidden, *output[1:]]
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


def depends_on_length(model: Any) -> bool:
    """Whether rotary frequencies change with the longest sequence of a batch, so with one's neighbours."""
    rope = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    kinds = {rope.get("rope_type"), *(r.get("rope_type") for r in rope.values() if isinstance(r, dict))}
    return bool(kinds & {"dynamic", "longrope"})


def context_of(model: Any) -> int:
    """Most tokens that the model takes."""
    config = model.config.get_text_config()
    names = ("max_position_embeddings", "max_seq_len", "max_sequence_length", "context_length")
    limits = [value for name in names if (value := getattr(config, name, None))]
    for module in model.modules():
        # RoBERTa's tables of positions begin behind the padding's.
        table = getattr(module, "position_embeddings", None)
        if isinstance(table, nn.Embedding) and table.padding_idx is not None:
            limits.append(table.num_embeddings - table.padding_idx - 1)
    return min(map(int, limits), default=2**20)
