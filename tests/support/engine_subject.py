"""An engine to be asked what it promises, on tiny models, some of them changed on purpose."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch

from perfit_cloud.engine.device_lock import DeviceLock
from perfit_cloud.engine.interface import CompletionStream, Engine, EngineKind, GenerationSettings, ShiftUse
from perfit_cloud.model.artefacts import Artefact
from perfit_cloud.model.base import BaseModel
from perfit_shared.types import Mode, Sampling, TokenLogprob
from tests.support.models import FAMILIES, random_shift

__all__ = [
    "PLAIN",
    "POISON",
    "SHORT",
    "SMALL",
    "Asked",
    "EngineSuite",
    "FragileEmbedding",
    "Subject",
    "endless",
    "fragile",
    "logprobs_of",
    "opinionated",
]

Asked = tuple[list[int], ShiftUse, Sampling]

PLAIN = ShiftUse(Mode.BASE)
SHORT = [0, 5, 6]
POISON = 7  # a token that a fragile model fails on
SMALL = GenerationSettings(cache_tokens=2048, batch_tokens=24, max_requests=16, pack_weights=True)


@dataclass(frozen=True)
class Subject:
    """An engine and what it was built from. While `held` lasts it begins nothing."""

    base: BaseModel
    artefacts: dict[str, Artefact]
    engine: Engine
    held: Callable[[], AbstractContextManager[None]]

    @property
    def artefact(self) -> Artefact:
        return self.artefacts["news_headline"]

    def person(self, seed: int, size: float = 0.5) -> ShiftUse:
        spec = self.artefact.spec
        return ShiftUse(Mode.PERSONAL, self.artefact, random_shift(spec, spec.personal_rank, seed, size))

    def together(self, asked: Sequence[Asked], owner: str = "") -> list[CompletionStream]:
        """Submit all before the engine begins, so that shapes are the same each time."""
        with self.held():
            return [self.engine.submit(*each, owner) for each in asked]

    def log_probabilities(self, asked: Sequence[Asked]) -> list[list[float]]:
        """Of every token of every answer: where one bit of a logit changes, these change."""
        streams = self.together([(p, use, replace(sampling, logprobs=1)) for p, use, sampling in asked])
        return [[token.logprob for token in logprobs_of(stream)] for stream in streams]


def logprobs_of(stream: CompletionStream) -> list[TokenLogprob]:
    """Of all tokens of an answer, which is read to its end."""
    chunks = list(stream)
    assert chunks[-1].finish
    return [token for chunk in chunks for token in chunk.logprobs]


def endless(base: BaseModel) -> BaseModel:
    """The same model without an end of sequence, so that every answer has all its tokens."""
    model = base.share_weights()
    model.generation_config.eos_token_id = []
    return replace(base, model=model)


def halved(base: BaseModel) -> BaseModel:
    """The same model in bfloat16."""
    return replace(base, model=copy.deepcopy(base.model).bfloat16(), precision="")


def opinionated(base: BaseModel) -> BaseModel:
    """The same model from a folder that suggests how to sample."""
    model = base.share_weights()
    model.generation_config.update(repetition_penalty=5.0, do_sample=True, temperature=9.0)
    return replace(base, model=model)


class FragileEmbedding(torch.nn.Embedding):
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        if bool((ids == POISON).any()):
            raise RuntimeError("secret")
        return super().forward(ids)


def fragile(base: BaseModel) -> BaseModel:
    """The same model, but that a pass with POISON in it fails."""
    model = base.share_weights()
    weight = model.get_input_embeddings().weight
    model.set_input_embeddings(FragileEmbedding(*weight.shape, _weight=weight))
    return replace(base, model=model)


class EngineSuite:
    """Tests that run once for each engine; subclasses of it say which."""

    kind: ClassVar[EngineKind]
    families: ClassVar[Sequence[str]] = tuple(FAMILIES)
    largest: ClassVar[float] = 8.0  # of a shift that is let through on these models
    few: ClassVar[Sequence[str]] = ("llama", "gpt2", "gemma3_text")  # for what a family hardly changes

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        for name in ("families", "few"):
            if f"each_of_{name}" in metafunc.fixturenames:
                metafunc.parametrize(f"each_of_{name}", getattr(self, name))

    def prepare(self, engine: Any, base: BaseModel) -> None:
        """For suites of engines whose passes are not those of `base`."""

    @pytest.fixture
    def build(self, load: Any, make_artefact: Any) -> Iterator[Callable[..., Subject]]:
        """Make an engine on a tiny model; keyword arguments change its settings."""
        made: list[Engine] = []

        def build(
            family: str = "llama", change: Callable[[BaseModel], BaseModel] | None = None, **settings: Any
        ) -> Subject:
            base = load(family) if change is None else change(load(family))
            artefacts = {
                "news_headline": make_artefact(base),
                "chat": make_artefact(
                    base, "chat", positions="s1+f1+l4", layers=(0, 2, 3), seed=9, ranks=(4, 5)
                ),
            }
            device_lock = DeviceLock()
            engine = type(self).kind(base, artefacts, replace(SMALL, **settings), device_lock)
            made.append(engine)
            self.prepare(engine, base)
            return Subject(base, artefacts, engine, device_lock.hold)

        yield build
        for engine in made:
            engine.stop()
