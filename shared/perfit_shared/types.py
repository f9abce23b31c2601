"""What both sides say about an answer: its settings, and what comes back."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

from perfit_shared.errors import InvalidInput

__all__ = ["Chunk", "Finish", "Mode", "Sampling", "Score"]


class Mode(StrEnum):
    """Which shift the intervened prompt positions go through."""

    BASE = "base"
    COLLECTIVE = "collective"
    PERSONAL = "personal"


@dataclass(frozen=True)
class Sampling:
    """How the tokens of an answer are chosen. Raises InvalidInput on what no cloud takes."""

    max_new_tokens: int
    temperature: float = 0.0  # 0: greedy
    top_k: int = 0  # 0: all tokens
    top_p: float = 1.0  # 1: all tokens
    seed: int = 0
    stop: tuple[str, ...] = ()  # an answer ends before the first of these texts

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise InvalidInput("an answer needs at least 1 token; try --max-tokens 48")
        if not (math.isfinite(self.temperature) and 0 <= self.temperature <= 100):
            raise InvalidInput("a temperature should be from 0 (greedy) to 100")
        if not 0 <= self.top_k < 2**32 or not 0 <= self.top_p <= 1 or not 0 <= self.seed < 2**64:
            raise InvalidInput("top-k and seed should not be negative, and top-p should be from 0 to 1")


class Finish(StrEnum):
    """Why an answer is over."""

    END = "end"  # an end of sequence, or a stop text
    LENGTH = "length"  # max_new_tokens


@dataclass(frozen=True)
class Chunk:
    """Part of an answer. The last one has `finish` and the counts."""

    text: str
    finish: Finish | None = None
    prompt_tokens: int = 0
    answer_tokens: int = 0


@dataclass(frozen=True)
class Score:
    log_likelihood: float  # nats, summed over answer and end of sequence
    tokens: int
