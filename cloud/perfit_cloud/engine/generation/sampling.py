"""Choosing the next token of every row of a batch: the arg-max, or a draw by the request's own generator.

The arg-max of logits / temperature plus Gumbel noise is a draw from the softmax.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from perfit_shared.types import Sampling

__all__ = ["Sampler", "draw", "log_probabilities"]

# The most tokens that top-k and top-p look at. Sorting more for every token would stall the batch.
_CANDIDATES = 1024


class Sampler:
    """Draws one request's tokens. The same seed gives the same draws, whoever else is in the batch."""

    def __init__(self, sampling: Sampling) -> None:
        self._sampling = sampling
        self._noise = np.random.default_rng(sampling.seed)

    def candidates(self, vocabulary: int) -> int | None:
        """How many of the likeliest tokens `draw` wants; None: all, in any order."""
        top_k = self._sampling.top_k or vocabulary
        if top_k >= vocabulary and self._sampling.top_p >= 1:
            return None
        return min(top_k, _CANDIDATES, vocabulary)

    def draw(self, logits: npt.NDArray[np.float32]) -> int:
        """The index of the drawn token among its candidates. For top-p the highest logits must come first.

        Temperature, then top-k, then top-p, as transformers orders them.
        """
        with np.errstate(all="ignore"):  # a hostile shift may have made logits infinite
            values = logits / np.float32(self._sampling.temperature)
            if self._sampling.top_p < 1:
                probabilities = np.exp(values - values[0])
                probabilities /= probabilities.sum()
                # Keep tokens until their sum reaches top_p; the first always stays.
                before = probabilities.cumsum() - probabilities
                values[before >= self._sampling.top_p] = -np.inf
            noise = self._noise.standard_exponential(len(values), dtype=np.float32)
            return int((values - np.log(noise)).argmax())  # −log of an exponential is Gumbel


def draw(logits: Tensor, samplers: Sequence[Sampler | None]) -> list[int]:
    """The next token of each row of logits (n, V): its sampler's draw, the arg-max where it has none."""
    tokens: list[int] = logits.argmax(-1).tolist()
    by_count: dict[int | None, list[tuple[int, Sampler]]] = {}
    for row, sampler in enumerate(samplers):
        if sampler is not None:
            by_count.setdefault(sampler.candidates(logits.shape[1]), []).append((row, sampler))
    for count, members in by_count.items():
        # One search and one transfer for all rows that want equally many.
        of_members = logits[[row for row, _ in members]].float()
        if count is None:
            values, ids = of_members.cpu().numpy(), None
        else:
            found = torch.topk(of_members, count)
            values, ids = found.values.cpu().numpy(), found.indices.cpu().numpy()
        for at, (row, sampler) in enumerate(members):
            drawn = sampler.draw(values[at])
            tokens[row] = drawn if ids is None else int(ids[at, drawn])
    return tokens


def log_probabilities(logits: Tensor, tokens: Sequence[int]) -> list[float]:
    """log p of one token of each row of logits (n, V), in nats. In float64: a logit's last bit shows."""
    wide = logits.double()
    chosen = wide[range(len(tokens)), list(tokens)]
    values: list[float] = (chosen - wide.logsumexp(-1)).tolist()
    return values
