"""Retrieval: the k own examples nearest to a query stand before it (Lewis et al., 2020; LaMP, OPPU).

A model that reads chats reads them as earlier turns, another as OPPU's lines. BM25 compares the query with
the input sides of the person's history. A state is that history.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self

from perfit_cloud.engine.gradients.batch import Pair
from perfit_cloud.lamp.methods.frozen import FrozenMethod
from perfit_cloud.lamp.methods.interface import FitContext, Fitted, QueryRequest, TaskData
from perfit_cloud.lamp.methods.prefixed import examples_as, pair_after
from perfit_cloud.lamp.people import Person, Query
from perfit_shared.errors import InvalidData, InvalidInput
from perfit_shared.json_input import is_date
from perfit_shared.retrieval import MOST_EXAMPLES, Retriever, input_text
from perfit_shared.tasks import Task

if TYPE_CHECKING:
    from perfit_cloud.lamp.request import LampRequest

__all__ = ["OwnExamples", "Rag", "check_k"]


@dataclass(frozen=True)
class OwnExamples:
    """One person's history, searchable."""

    task: Task
    items: tuple[Mapping[str, str], ...] = ()  # oldest first
    dates: tuple[str, ...] = ()  # of each item, "" where there is none

    @classmethod
    def of(cls, task: Task, person: Person) -> Self:
        return cls(task, person.history, person.dates or ("",) * len(person.history))

    def nearest(self, query: Query, k: int) -> list[Mapping[str, str]]:
        """The k nearest, best first.

        The query itself is never among them, nor what is later than it where both have dates.
        """
        asked = input_text(self.task, query.item)
        fitting = [
            i
            for i in self._retriever.best(asked, len(self.items))
            if self._inputs[i] != asked and not _is_later(self.dates[i], query.date)
        ]
        return [self.items[i] for i in fitting[:k]]

    def pair(self, data: TaskData, query: Query, k: int, item: Mapping[str, str]) -> Pair:
        """What the model reads of the query's item behind its k nearest, and the item's answer."""
        return pair_after(data, self.task, self.nearest(query, k), item)

    @cached_property
    def _inputs(self) -> list[str]:
        return [input_text(self.task, item) for item in self.items]

    @cached_property
    def _retriever(self) -> Retriever:
        return Retriever(self._inputs)

    def to_bytes(self) -> bytes:
        return json.dumps({"items": self.items, "dates": self.dates}, ensure_ascii=False).encode()

    @classmethod
    def from_bytes(cls, task: Task, data: bytes) -> Self:
        """Raises InvalidData."""
        try:
            raw = json.loads(data)
            items, dates = tuple(raw["items"]), tuple(raw["dates"])
            found = cls(task, tuple({str(k): str(v) for k, v in item.items()} for item in items), dates)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise InvalidData("not a person's examples") from error
        if len(items) != len(dates):
            raise InvalidData("not a person's examples")
        return found


def _is_later(date: str, query: str) -> bool:
    return is_date(date) and is_date(query) and date > query


def check_k(request: LampRequest) -> None:
    if not 1 <= request.k <= MOST_EXAMPLES:
        raise InvalidInput(f"--k should be from 1 to {MOST_EXAMPLES}")


class Rag(FrozenMethod[OwnExamples]):
    name = "rag"
    options = frozenset({"k"})
    state_file = "examples.json"
    parameters = 0

    @classmethod
    def check(cls, request: LampRequest) -> None:
        check_k(request)

    @property
    def settings(self) -> Mapping[str, Any]:
        return {"k": self.request.k, "examples_as": examples_as(self.data.task)}

    def prepare(self, stop: Callable[[], bool]) -> float:
        return 0.0

    @property
    def start(self) -> OwnExamples:
        return OwnExamples(self.data.task)

    @property
    def shared(self) -> Mapping[str, OwnExamples]:
        return {"base": self.start}

    def fit(self, person: Person, context: FitContext) -> Fitted[OwnExamples]:
        context.stop()
        began = time.monotonic()
        state = OwnExamples.of(self.data.task, person)
        context.done(len(person.history), 1)
        return Fitted(state, seconds=time.monotonic() - began)

    def pair(self, request: QueryRequest[OwnExamples], item: Mapping[str, str]) -> Pair:
        return request.state.pair(self.data, request.query, self.request.k, item)

    def to_bytes(self, state: OwnExamples) -> bytes:
        return state.to_bytes()

    def from_bytes(self, data: bytes) -> OwnExamples:
        return OwnExamples.from_bytes(self.data.task, data)
