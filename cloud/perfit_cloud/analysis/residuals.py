"""Outputs of every block at the last token of many sequences, several in a pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from perfit_cloud.engine.gradients.batch import BatchBudget
from perfit_cloud.model.base import BaseModel
from perfit_cloud.model.blocks import block_list, hidden_of
from perfit_cloud.model.capabilities import left_padded
from perfit_cloud.model.forward import decoder_output
from perfit_cloud.model.partial import Indices

__all__ = ["last_tokens"]


def last_tokens(
    base: BaseModel, sequences: Sequence[Sequence[int]], *, tokens: int
) -> Iterator[tuple[Indices, Tensor]]:
    """(which sequences, their (n, blocks, d) in float32 on the CPU), shortest first, each sequence once.

    A pass has at most `tokens` tokens with its padding, unless it is one sequence. It holds of each block
    only the last token, and the head does not run.
    """
    lengths = np.array([len(sequence) for sequence in sequences], dtype=np.int64)
    budget = BatchBudget.of_whole(base.capabilities.passes, tokens)
    for chosen in budget.cut(lengths, lengths):
        yield chosen, _pass(base, [sequences[i] for i in chosen])


@torch.no_grad()
def _pass(base: BaseModel, sequences: Sequence[Sequence[int]]) -> Tensor:
    found: list[Tensor] = []

    def take(_module: nn.Module, _args: Any, output: Any) -> None:
        hidden = hidden_of(output)
        # Padding stands on the left. Some families have several streams; a shift reaches the first.
        found.append(hidden.reshape(-1, *hidden.shape[-3:])[0, :, -1].float().to(base.device))

    ids, mask, positions = (tensor.to(base.device) for tensor in left_padded(sequences))
    # A mask without padding only slows attention down.
    padded = {} if bool(mask.all()) else {"attention_mask": mask}
    with ExitStack() as hooks:
        for block in block_list(base.model):
            hooks.callback(block.register_forward_hook(take).remove)
        decoder_output(base.model, base.capabilities.arguments, ids, position_ids=positions, **padded)
    return torch.stack(found, 1).cpu()
