"""Activation steering: read what a block says at a text's end, and add a vector to what it says."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from perfit_cloud.model.base import BaseModel
from perfit_cloud.model.blocks import block_list, hidden_of, with_hidden
from perfit_cloud.model.capabilities import left_padded
from perfit_cloud.model.forward import decoder_output

__all__ = ["last_states", "steered"]


def last_states(base: BaseModel, texts: Sequence[list[int]], layer: int) -> Tensor:
    """Behind block `layer`, the hidden state of each text's last token: (B, d), float32; one pass."""
    found: list[Tensor] = []

    def look(_module: nn.Module, _args: Any, output: Any) -> None:
        found.append(hidden_of(output)[:, -1].float())

    ids, mask, positions = (tensor.to(base.device) for tensor in left_padded(texts))
    handle = block_list(base.model)[layer].register_forward_hook(look)
    try:
        with torch.no_grad():
            arguments = base.capabilities.arguments
            decoder_output(base.model, arguments, ids, attention_mask=mask, position_ids=positions)
    finally:
        handle.remove()
    return found[0]


@contextlib.contextmanager
def steered(model: Any, layer: int, vector: Tensor, columns: Callable[[int], Tensor]) -> Iterator[None]:
    """Add `vector` (d,) to the last columns of what block `layer` gives, until the end of the block.

    `columns` says how many, of a pass that is so many tokens wide: (B, 1) or (1, 1).
    """

    def add(_module: nn.Module, _args: Any, output: Any) -> Any:
        hidden = hidden_of(output)  # (B, T, d)
        width = hidden.shape[1]
        last = columns(width).to(hidden.device)
        chosen = torch.arange(width, device=hidden.device) >= width - last  # (B, T)
        added = hidden + (chosen.unsqueeze(-1) * vector.to(hidden.device)).to(hidden.dtype)
        return with_hidden(output, added)

    handle = block_list(model)[layer].register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()
