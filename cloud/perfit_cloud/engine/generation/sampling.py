"""Choosing the next token of every row of a batch: the arg-max, or a draw by the request's own generator.

The arg-max of logits / temperature plus Gumbel noise is a draw from the softmax. Penalties come before.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from perfit_cloud.engine.generation.penalties import Penalties, penalize
from perfit_shared.types import Sampling

__all__ = ["Likelihood", "Sampler", "draw", "forget", "likelihoods"]

# The most tokens that top-k and top-p look at. Sorting more for every token would stall the batch.
_CANDIDATES = 1024


class Sampler:
    """Chooses one request's tokens. The same seed gives the same ones, whoever else is in the batch."""

    def __init__(self, sampling: Sampling) -> None:
        self._sampling = sampling
        self._noise = np.random.default_rng(sampling.seed)
        self.penalties = Penalties(sampling) if sampling.has_penalties else None

    @classmethod
    def of(cls, sampling: Sampling) -> Sampler | None:
        """None: the arg-max of the logits."""
        return cls(sampling) if sampling.temperature > 0 or sampling.has_penalties else None

    def candidates(self, vocabulary: int) -> int | None:
        """How many of the likeliest tokens `draw` wants; None: all, in any order."""
        if self._sampling.temperature <= 0:
            return 1
        top_k = self._sampling.top_k or vocabulary
        if top_k >= vocabulary and self._sampling.top_p >= 1:
            return None
        return min(top_k, _CANDIDATES, vocabulary)

    def draw(self, logits: npt.NDArray[np.float32]) -> int:
        """The index of the drawn token among its candidates. For top-p the highest logits must come first.

        Temperature, then top-k, then top-p, as transformers orders them.
        """
        if len(logits) == 1:
            return 0
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
    """The next token of each row of logits (n, V): its sampler's draw, the arg-max where it has none.

    Leaves the logits as they are.
    """
    tokens: list[int] = logits.argmax(-1).tolist()
    by_count: dict[int | None, list[tuple[int, Sampler]]] = {}
    for row, sampler in enumerate(samplers):
        if sampler is not None:
            by_count.setdefault(sampler.candidates(logits.shape[1]), []).append((row, sampler))
    for count, members in by_count.items():
        # One search and one transfer for all rows that want equally many.
        of_members = logits[[row for row, _ in members]].float()
        penalize(of_members, [sampler.penalties for _, sampler in members])
        if count is None:
            values, ids = of_members.cpu().numpy(), None
        else:
            # The arg-max, which breaks ties as that of a row without a sampler does.
            found = of_members.max(-1, keepdim=True) if count == 1 else torch.topk(of_members, count)
            values, ids = found.values.cpu().numpy(), found.indices.cpu().numpy()
        for at, (row, sampler) in enumerate(members):
            drawn = sampler.draw(values[at])
            tokens[row] = drawn if ids is None else int(ids[at, drawn])
            if sampler.penalties is not None:
                sampler.penalties.add(tokens[row])
    return tokens


def forget(samplers: Iterable[Sampler | None]) -> None:
    """Overwrite the tokens that samplers hold, at the end of their answers."""
    for sampler in samplers:
        if sampler is not None and sampler.penalties is not None:
            sampler.penalties.forget()


class Likelihood(NamedTuple):
    """log p of a chosen token, in nats, and of the likeliest at its place: (token, log p)."""

    chosen: float
    top: tuple[tuple[int, float], ...]  # likeliest first


def likelihoods(logits: Tensor, tokens: Sequence[int], wanted: Sequence[int]) -> list[Likelihood | None]:
    """Of one token of each row of logits (n, V), with as many others as the row wants. None: it wants none.

    Log-softmax in float64, so that a logit's last bit shows.
    """
    rows = [row for row, count in enumerate(wanted) if count]
    found: list[Likelihood | None] = [None] * len(tokens)
    if not rows:
        return found
    asked = logits[rows]
    wide = asked.double()
    of_all = wide.logsumexp(-1, keepdim=True)
    chosen = wide[range(len(rows)), [tokens[row] for row in rows]] - of_all[:, 0]
    top = torch.topk(asked, min(max(wanted), asked.shape[1]))
    values, ids = (top.values.double() - of_all).tolist(), top.indices.tolist()
    for at, (row, of_row) in enumerate(zip(rows, chosen.tolist(), strict=True)):
        count = wanted[row]
        found[row] = Likelihood(of_row, tuple(zip(ids[at][:count], values[at][:count], strict=True)))
    return found
