"""Answers and log-likelihoods of a frozen model, each query under a shift of its own or none."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from perfit_cloud.engine.gradients.batch import Pair
from perfit_cloud.engine.gradients.stateless import GradientEngine
from perfit_cloud.engine.interface import ShiftUse
from perfit_cloud.lamp.people import Query
from perfit_shared.errors import InvalidInput
from perfit_shared.tasks import Task
from perfit_shared.types import Sampling, Score

__all__ = ["Decoding", "score_frozen"]


@dataclass(frozen=True)
class Decoding:
    """How answers are drawn; the defaults are the paper's. Temperature 0: greedy."""

    temperature: float = 0.1
    top_k: int = 10
    top_p: float = 0.9
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises InvalidInput."""
        if not 0 <= self.temperature <= 100:
            raise InvalidInput("a temperature should be from 0 (greedy) to 100")

    def sampling(self, task: Task, user_id: str, query: Query) -> Sampling:
        """Each query has its own seed, so no draw depends on other queries."""
        name = f"{self.seed}/{user_id}/{query.id}".encode()
        return task.sampling(
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            seed=int.from_bytes(hashlib.sha256(name).digest()[:7], "big"),
        )


def score_frozen(
    engine: GradientEngine, pairs: Sequence[Pair], uses: Sequence[ShiftUse], *, owners: Sequence[str]
) -> list[Score]:
    """The log-likelihood of each target. Neighbours of one owner and shift share passes."""
    scores: list[Score] = []
    for _, rows in groupby(range(len(pairs)), key=lambda i: (owners[i], id(uses[i]))):
        own = list(rows)
        scores += engine.score([pairs[i] for i in own], uses[own[0]])
    return scores
