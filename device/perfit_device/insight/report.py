"""What `perfit insight` shows, as plain values."""

from __future__ import annotations

from dataclasses import dataclass

from perfit_device.training.journal import Entry, Measured

__all__ = ["Answered", "Insight", "Layer", "Learned"]


@dataclass(frozen=True)
class Layer:
    number: int
    moved: float  # Frobenius norm of what the personal map adds to the seed's
    seed: float  # of what the seed itself adds


@dataclass(frozen=True)
class Learned:
    """One example that trained: its loss under the seed and under the personal shift, nats a token."""

    name: str
    prompt: str
    answer: str
    before: float
    after: float

    @property
    def drop(self) -> float:
        return self.before - self.after


@dataclass(frozen=True)
class Answered:
    """One test example, and what was answered to it."""

    prompt: str
    mine: str  # the person's own answer
    base: str
    personal: str


@dataclass(frozen=True)
class Insight:
    artefact: str
    version: int
    date: str
    updates: tuple[Entry, ...]  # oldest first
    layers: tuple[Layer, ...]  # empty: the seed is not kept, and the cloud was not asked
    measured: Measured | None
    examples: tuple[Learned, ...]  # those that the shift learned most of first
    examples_date: str = ""  # when they were scored
    examples_version: int | None = None  # of the shift that they were scored under
    answers: tuple[Answered, ...] = ()
    gain_on_test: float | None = None  # how far the loss fell on test examples, from seed to personal
