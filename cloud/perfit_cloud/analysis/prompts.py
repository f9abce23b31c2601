"""Token ids of a query alone, with its history before it, and with random tokens in the history's place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from perfit_cloud.analysis.queries import Question
from perfit_cloud.collective.encoding import TOKEN_CAP
from perfit_cloud.model.base import BaseModel
from perfit_shared.tasks import Task

__all__ = ["Prompt", "Prompts"]


@dataclass(frozen=True)
class Prompt:
    alone: list[int]
    at: int  # where the history comes in: behind what a tokenizer or a chat template puts in front
    history: list[int]

    @property
    def with_history(self) -> list[int]:
        return self.with_prefix(self.history)

    def with_prefix(self, ids: Sequence[int]) -> list[int]:
        return [*self.alone[: self.at], *ids, *self.alone[self.at :]]


class Prompts:
    """Encodes questions for one model."""

    def __init__(self, base: BaseModel, task: Task) -> None:
        self._base, self._task = base, task
        self.cap = min(base.context, TOKEN_CAP)
        special = set(base.tokenizer.all_special_ids) | set(base.end_ids)
        size = base.model.get_input_embeddings().weight.shape[0]
        self._words = np.array([i for i in range(min(size, len(base.tokenizer))) if i not in special])

    def encode(self, question: Question) -> Prompt | None:
        """The history's tokens end where the cap is reached; None where the query leaves no room for any."""
        read = self._task.read_as
        alone = self._base.encode_prompt(read(question.prompt))
        if len(alone) >= self.cap:
            return None
        both = self._base.encode_prompt(read(f"{question.history}\n{question.prompt}"))
        at = next((i for i, pair in enumerate(zip(alone, both, strict=False)) if pair[0] != pair[1]), 0)
        # The query keeps its own tokens: one that would join the history's last letters does not.
        added = both[at : at + len(both) - len(alone)][: self.cap - len(alone)]
        return Prompt(alone, at, added) if added else None

    def random_prefix(self, length: int, *key: int) -> list[int]:
        """So many ordinary tokens, none of them special; the same for the same key."""
        chosen: list[int] = np.random.default_rng(key).choice(self._words, length).tolist()
        return chosen
