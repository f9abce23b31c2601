"""Choosing the next token of every row of a batch: the arg-max, or a draw of the request's own.

A draw is the arg-max of log-probability / temperature plus Gumbel noise from the request's own
generator, which is a draw from the softmax.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from perfit_cloud.engine.interface import Sampling

__all__ = ["Sampler", "draw"]


# Of the likeliest tokens, the most that top-k and top-p look at: more would have to be sorted for
# every token of an answer, while everybody waits.
_CANDIDATES = 1024


class Sampler:
    """Draws one request's tokens. The same seed gives the same draws, whoever else is in the batch."""

    def __init__(self, sampling: Sampling) -> None:
        self._sampling = sampling
        self._noise = np.random.default_rng(sampling.seed)

    def candidates(self, vocabulary: int) -> int | None:
        """How many of the likeliest tokens it looks at; None: all, in any order."""
        top_k = self._sampling.top_k or vocabulary
        if top_k >= vocabulary and self._sampling.top_p >= 1:
            return None
        return min(top_k, _CANDIDATES, vocabulary)

    def draw(self, logits: npt.NDArray[np.float32]) -> int:
        """The place of the drawn one among its candidates' logits, for top-p the highest first.

        Temperature, then top-k, then top-p, as transformers orders them.
        """
        with np.errstate(all="ignore"):  # a hostile shift may have made them infinite
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
        # One search and one transfer for all who look at equally many.
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
