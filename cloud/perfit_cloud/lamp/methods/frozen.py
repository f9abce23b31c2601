"""What all methods share that answer with the frozen model: prompts, answers and losses.

A method says how a query's prompt is made (`pair`) and under which shift it is read (`use`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property
from typing import TYPE_CHECKING

from perfit_cloud.engine.generation.offline import generate_all
from perfit_cloud.engine.gradients.batch import Pair
from perfit_cloud.engine.gradients.stateless import GradientEngine
from perfit_cloud.engine.interface import ShiftUse
from perfit_cloud.lamp.measure import score_frozen
from perfit_cloud.lamp.methods.interface import Done, Method, QueryRequest, State, TaskData
from perfit_shared.types import Mode, Score

if TYPE_CHECKING:
    from perfit_cloud.lamp.request import LampRequest

__all__ = ["FrozenMethod"]

_BASE = ShiftUse(Mode.BASE)


class FrozenMethod(Method[State]):
    def __init__(self, request: LampRequest, data: TaskData) -> None:
        super().__init__(request, data)
        self._engines = ExitStack()

    def pair(self, request: QueryRequest[State], item: Mapping[str, str]) -> Pair:
        """Token ids of what the model reads of a query's item, and of the answer that the item holds."""
        return self.data.encoder.query(item).pair

    def use(self, state: State) -> ShiftUse:
        return _BASE

    def pairs(
        self, requests: Sequence[QueryRequest[State]], answers: Sequence[str] | None = None
    ) -> list[Pair]:
        """Of each query with its gold answer, or with one of these."""
        items = [one.query.item for one in requests]
        if answers is not None:
            gold = self.data.task.gold_field
            items = [{**item, gold: text} for item, text in zip(items, answers, strict=True)]
        return [self.pair(one, item) for one, item in zip(requests, items, strict=True)]

    def answer(self, requests: Sequence[QueryRequest[State]], done: Done) -> list[str]:
        prompts = [prompt for prompt, _ in self.pairs(requests)]
        uses, samplings = [self.use(one.state) for one in requests], [one.sampling for one in requests]
        return generate_all(self.data.base, prompts, uses, samplings, done=done)

    def score(
        self, requests: Sequence[QueryRequest[State]], answers: Sequence[str] | None = None
    ) -> list[Score]:
        uses, owners = [self.use(one.state) for one in requests], [one.user_id for one in requests]
        return score_frozen(self._scorer, self.pairs(requests, answers), uses, owners=owners)

    @cached_property
    def _scorer(self) -> GradientEngine:
        engine = GradientEngine(self.data.base)
        self._engines.callback(engine.close)
        return engine

    def close(self) -> None:
        self._engines.close()
