"""What the engine takes and gives: plain values, no grpc."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from perfit_cloud.model.artefacts import Artefact
from perfit_shared.shifts import ShiftTensors

__all__ = ["Chunk", "EngineHealth", "Finish", "Gradient", "Mode", "Sampling", "Score", "ShiftUse"]


class Mode(Enum):
    """Which shift the intervened prompt positions go through."""

    BASE = "base"
    COLLECTIVE = "collective"
    PERSONAL = "personal"


@dataclass(frozen=True)
class ShiftUse:
    """One request's shift. `personal` is set in PERSONAL mode alone, `artefact` unless BASE."""

    mode: Mode
    artefact: Artefact | None = None
    personal: ShiftTensors | None = None


@dataclass(frozen=True)
class Sampling:
    max_new_tokens: int
    temperature: float = 0.0  # 0: greedy
    top_k: int = 0  # 0: all tokens
    top_p: float = 1.0  # 1: all tokens
    seed: int = 0
    stop: tuple[str, ...] = ()


class Finish(Enum):
    END = "end"  # end of sequence, or a stop text
    LENGTH = "length"  # max_new_tokens


@dataclass(frozen=True)
class Chunk:
    """Part of an answer; `finish` and the counts on the last one."""

    text: str
    finish: Finish | None = None
    prompt_tokens: int = 0
    answer_tokens: int = 0


@dataclass(frozen=True)
class Score:
    log_likelihood: float  # nats, summed over answer and end of sequence
    tokens: int


class EngineHealth(NamedTuple):
    """How an engine fares: what tells one that works from one that is stuck or dead."""

    running: int  # requests or steps at work
    waiting: int  # and in line
    stalled_seconds: float  # since it last got on with them; 0 when there is nothing to do
    is_alive: bool  # false: it takes up nothing any more


@dataclass(frozen=True)
class Gradient:
    loss: float  # nats a token, mean over all target tokens of the batch
    tokens: int
    tensors: ShiftTensors  # d loss / d personal tensor, float32
