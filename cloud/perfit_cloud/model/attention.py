"""Attention for packed batches: grouped heads side by side, a bias, and soft-capping."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["attend", "hiding"]

_MOST_SCORES = 1 << 22  # 16 MiB in float32


def attend(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, *, scale: float | None, softcap: float | None
) -> Tensor:
    """softmax(cap(q kᵀ · scale) + bias) v for (B, K, n, D); cap(x) = softcap · tanh(x / softcap).

    Without a scale it is 1 / √D.
    """
    if softcap is None and not _fused_is_slow(query, key):
        return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = query @ key.mT * (scale / (softcap or 1.0))
    if softcap is not None:
        scores = torch.tanh(scores) * softcap
    return (scores + bias).softmax(-1, dtype=torch.float32).to(value.dtype) @ value


def _fused_is_slow(query: Tensor, key: Tensor) -> bool:
    """A CPU's fused backward takes five times as long for a few dozen queries as the products one by one.

    These hold all scores, so many of them are left to the fused one.
    """
    if not torch.is_grad_enabled() or query.device.type != "cpu":
        return False
    return query.shape[:-1].numel() * key.shape[-2] <= _MOST_SCORES


def hiding(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """A bias that hides the keys where `hidden` is true: −∞ there, 0 elsewhere."""
    return torch.zeros_like(hidden, dtype=dtype).masked_fill_(hidden, -torch.inf)
