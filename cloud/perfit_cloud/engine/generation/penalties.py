"""OpenAI's frequency and presence penalties on the tokens that an answer has so far.

    logit ← logit − count · frequency_penalty − (count > 0) · presence_penalty

before temperature, top-k and top-p (platform.openai.com/docs/advanced-usage, "frequency and presence
penalties"). The prompt does not count.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from perfit_shared.types import Sampling

__all__ = ["Penalties", "penalize"]


class Penalties:
    """How often each token stands in one answer, and what its logit loses by that.

    Tokens stand in arrays of the answer's full length, so that nothing is copied when it grows, and `forget`
    reaches all of them.
    """

    def __init__(self, sampling: Sampling) -> None:
        self._frequency = np.float32(sampling.frequency_penalty)
        self._presence = np.float32(sampling.presence_penalty)
        self._ids = np.zeros(sampling.max_new_tokens, np.int64)  # in the order of their first places
        self._counts = np.zeros(sampling.max_new_tokens, np.float32)
        self.different = 0  # tokens

    @property
    def ids(self) -> npt.NDArray[np.int64]:
        """The different tokens of the answer: a view."""
        return self._ids[: self.different]

    @property
    def amounts(self) -> npt.NDArray[np.float32]:
        """What the logit of each of `ids` loses."""
        return self._counts[: self.different] * self._frequency + self._presence

    def add(self, token: int) -> None:
        """The answer's next token."""
        found = np.flatnonzero(self.ids == token)
        at = int(found[0]) if len(found) else self.different
        self._ids[at] = token
        self._counts[at] += 1
        self.different = max(self.different, at + 1)

    def forget(self) -> None:
        """Overwrite the tokens. Harmless twice."""
        self._ids.fill(0)
        self._counts.fill(0)
        self.different = 0


def penalize(logits: Tensor, penalties: Sequence[Penalties | None]) -> None:
    """Lower float32 logits (n, V) in place, each row by its own penalties."""
    asked = [(row, of) for row, of in enumerate(penalties) if of is not None and of.different]
    if not asked:
        return
    rows = torch.tensor([row for row, of in asked for _ in range(of.different)], device=logits.device)
    seen = np.concatenate([of.ids for _, of in asked])
    ids = torch.from_numpy(seen).to(logits.device)
    amounts = torch.from_numpy(np.concatenate([of.amounts for _, of in asked])).to(logits.device)
    logits[rows, ids] -= amounts  # no place stands twice
    ids.zero_()  # a run of an answer's tokens
    seen.fill(0)
