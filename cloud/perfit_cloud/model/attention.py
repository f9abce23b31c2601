"""Attention for packed batches: grouped heads side by side, a bias, and soft-capping."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["attend", "hiding"]


def attend(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, *, scale: float | None, softcap: float | None
) -> Tensor:
    """softmax(cap(q kᵀ · scale) + bias) v for (B, K, n, D); cap(x) = softcap · tanh(x / softcap).

    Without a scale it is 1 / √D.
    """
    if softcap is None:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = torch.tanh(query @ key.mT * (scale / softcap)) * softcap + bias
    return scores.softmax(-1, dtype=torch.float32).to(value.dtype) @ value


def hiding(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """A bias that hides the keys where `hidden` is true: −∞ there, 0 elsewhere."""
    return torch.zeros_like(hidden, dtype=dtype).masked_fill_(hidden, -torch.inf)
