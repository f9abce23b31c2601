"""Attention sinks: leading prompt tokens whose hidden states are far longer than all others'.

Heads that have nothing to say attend to such a token, so all others rely on its state (Xiao et al.,
"Efficient Streaming Language Models with Attention Sinks"; Sun et al., "Massive Activations in Large
Language Models"). Its norm also dwarfs what a rate that suits other tokens does per step. A shift spec
leaves it out (`Positions.skipped`), which is decided once, when the spec is made: a rule on the rows of
a call could not be the same in every batch and every chunk of a prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from perfit_cloud.model.base import BaseModel
from perfit_cloud.model.blocks import block_list, hidden_of
from perfit_shared.positions import Positions

__all__ = ["evenly", "leading_sinks", "past_sinks"]

T = TypeVar("T")

# A sink's norm over the median of its prompt. Sinks of trained models are at 35 to 160 behind middle
# blocks (SmolLM2); begin-of-sequence tokens that are none, and delimiters, stay under 11.
_FACTOR = 20.0
_PROMPTS = 16  # that are looked at
_MOST_SKIPPED = 4  # further ones are words of the prompt, not the model's habit


def past_sinks(positions: str, base: BaseModel, prompts: Sequence[list[int]], first_block: int) -> str:
    """`positions` with this model's leading sinks left out, such as "s1+f7+l7" of "f7+l7".

    Those that say themselves how many tokens to skip ("s0+f7+l7" for none) are only parsed.
    """
    asked = Positions.parse(positions)
    if positions.startswith("s") or not asked.first:
        return str(asked)
    return str(replace(asked, skipped=leading_sinks(base, prompts, first_block)))


def leading_sinks(base: BaseModel, prompts: Sequence[list[int]], first_block: int) -> int:
    """How many leading tokens to leave out: up to the last sink among the first 4, 0 if there is none.

    A token counts when it is one in most of the prompts (token ids; at most 16 of them, evenly drawn, are
    run) behind block `first_block` or any above: a shift further down may keep a sink from forming.
    """
    drawn = [p for p in evenly(prompts) if len(p) > 2 * _MOST_SKIPPED]
    votes = [0] * _MOST_SKIPPED
    for prompt in drawn:
        longest = _longest(base, prompt, first_block)
        for position in range(_MOST_SKIPPED):
            votes[position] += longest[position] > _FACTOR
    return max((position + 1 for position, count in enumerate(votes) if 2 * count > len(drawn)), default=0)


def evenly(prompts: Sequence[T]) -> Sequence[T]:
    """Those that are looked at: all of them, or at most 16 evenly drawn."""
    return prompts[:: -(-len(prompts) // _PROMPTS) or 1]


def _longest(base: BaseModel, prompt: Sequence[int], first_block: int) -> list[float]:
    """Of every token, the largest norm over the prompt's median, behind any block from `first_block` on."""
    ratios: list[Tensor] = []

    def measure(_module: nn.Module, _args: Any, output: Any) -> None:
        norms = hidden_of(output)[0].float().norm(dim=-1).to(base.device)  # (T,)
        ratios.append(norms / norms.median().clamp_min(torch.finfo(torch.float32).tiny))

    handles = [block.register_forward_hook(measure) for block in block_list(base.model)[first_block:]]
    try:
        with torch.no_grad():
            ids = torch.tensor([list(prompt)], device=base.device)
            base.model(input_ids=ids, use_cache=False, logits_to_keep=1)
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack(ratios).amax(0).tolist()
