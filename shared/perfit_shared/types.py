"""What both sides say about an answer: its settings, and what comes back."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

from perfit_shared.errors import InvalidInput

__all__ = [
    "LARGEST_PENALTY",
    "MOST_LOGPROBS",
    "Chunk",
    "Finish",
    "Mode",
    "Sampling",
    "Score",
    "TokenLogprob",
    "TopLogprob",
    "are_penalties",
]

LARGEST_PENALTY = 2  # OpenAI's and vLLM's bound, of both signs
MOST_LOGPROBS = 20  # alternatives of one token


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
    logprobs: int = 0  # how many likeliest tokens to name beside each chosen one; 0: no log-probabilities
    frequency_penalty: float = 0.0  # taken off a token's logit for each time that the answer has it
    presence_penalty: float = 0.0  # taken off it once, where the answer has it at all

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise InvalidInput("an answer needs at least 1 token; try --max-tokens 48")
        if not (math.isfinite(self.temperature) and 0 <= self.temperature <= 100):
            raise InvalidInput("a temperature should be from 0 (greedy) to 100")
        if not 0 <= self.top_k < 2**32 or not 0 <= self.top_p <= 1 or not 0 <= self.seed < 2**64:
            raise InvalidInput("top-k and seed should not be negative, and top-p should be from 0 to 1")
        if not 0 <= self.logprobs <= MOST_LOGPROBS:
            raise InvalidInput(f"logprobs should be from 0 (none) to {MOST_LOGPROBS}")
        if not are_penalties(self.frequency_penalty, self.presence_penalty):
            raise InvalidInput(f"penalties should be from -{LARGEST_PENALTY} to {LARGEST_PENALTY}")

    @property
    def has_penalties(self) -> bool:
        return self.frequency_penalty != 0 or self.presence_penalty != 0


def are_penalties(*values: float) -> bool:
    """Whether all are within bounds; NaN is not."""
    return all(-LARGEST_PENALTY <= value <= LARGEST_PENALTY for value in values)


class Finish(StrEnum):
    """Why an answer is over."""

    END = "end"  # an end of sequence, or a stop text
    LENGTH = "length"  # max_new_tokens


@dataclass(frozen=True)
class TopLogprob:
    """One of the likeliest tokens at its place."""

    token: str  # its text; the name of a special token
    data: bytes  # what it adds to the answer: part of a character, perhaps; nothing for a special token
    logprob: float  # nats, by the model's own logits: before penalties and temperature


@dataclass(frozen=True)
class TokenLogprob:
    """A token of an answer, described as `TopLogprob`, with the likeliest at its place, likeliest first."""

    token: str
    data: bytes
    logprob: float
    top: tuple[TopLogprob, ...]


@dataclass(frozen=True)
class Chunk:
    """Part of an answer. The last one has `finish` and the counts.

    `logprobs`, where they are asked for: of the tokens whose text begins in this part, and on the last
    chunk of an end of sequence.
    """

    text: str
    finish: Finish | None = None
    prompt_tokens: int = 0
    answer_tokens: int = 0
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Score:
    log_likelihood: float  # nats, summed over answer and end of sequence
    tokens: int
