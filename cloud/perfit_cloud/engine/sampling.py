"""Sampling a request at a time inside a shared batch.

Continuous batching picks the arg-max of the processed scores. For a request that samples, its row
is replaced by one token: the arg-max of log-probability / temperature plus Gumbel noise from the
request's own generator, which is a draw from the softmax. Greedy rows stay as they are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from perfit_cloud.engine.types import Sampling

__all__ = ["Sampler"]


class Sampler:
    """Draws one request's tokens. The same seed gives the same draws, whoever else is in the batch."""

    def __init__(self, sampling: Sampling) -> None:
        self._sampling = sampling
        self._generator = torch.Generator().manual_seed(sampling.seed % 2**63)

    def draw(self, logits: Tensor) -> int:
        """A token id from logits (V,): temperature, then top-k, then top-p, as transformers orders them."""
        s = self._sampling
        count = min(s.top_k, len(logits)) if s.top_k else len(logits)
        values, ids = torch.topk(logits.float(), count)  # descending
        values = values / s.temperature
        if s.top_p < 1:
            probabilities = values.softmax(0)
            # Keep tokens until their sum reaches top_p; the first always stays.
            before = probabilities.cumsum(0) - probabilities
            values = values.masked_fill(before >= s.top_p, -torch.inf)
        uniform = torch.rand(count, generator=self._generator).to(values.device)
        gumbel = -torch.log(-torch.log(uniform.clamp(1e-20, 1 - 1e-7)))
        return int(ids[(values + gumbel).argmax()])
