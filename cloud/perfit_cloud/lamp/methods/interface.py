"""The interface between a LaMP run and a method of personalisation.

    method.prepare(stop)                       what everybody shares, such as stage 1
    fitted = method.fit(person, context)       one person's own state, from their history alone
    texts = method.answer(requests, done)      held-out queries, each with the state that answers it

`fit` promises: the state depends on this person's history and on what `prepare` made, on nobody else's
text and not on the order of people; fitting again gives the same bytes. `answer` and `score` promise: a
query is answered by the state that it came with alone, its gold answer and the other queries of the call
change nothing, and the model is left as it was. All ask `data.task` with `QueryRequest.sampling`, so methods
differ in nothing but what they add. `data` is read at each call: `drift` asks another task through it.

A new method is one file in this folder and one entry in `methods.METHODS`; `lamp run --method` and the
tests of what all methods promise then take it by its name. Options that it alone reads go into `options`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from perfit_cloud.collective.encoding import Encoder
from perfit_cloud.lamp.people import People, Person, Query
from perfit_cloud.model.base import BaseModel
from perfit_shared.tasks import Task
from perfit_shared.types import Sampling, Score

if TYPE_CHECKING:
    from perfit_cloud.lamp.request import LampRequest

__all__ = ["FitContext", "Fitted", "Method", "QueryRequest", "TaskData"]

State = TypeVar("State")
Done = Callable[[int], None]  # gets how many more examples or queries are done


@dataclass(frozen=True)
class TaskData:
    """One task with the model that answers it and the people who are tested on it."""

    task: Task
    base: BaseModel
    people: People

    @cached_property
    def encoder(self) -> Encoder:
        return Encoder(self.base, self.task)


@dataclass(frozen=True)
class FitContext:
    """How a long fit reports, stops and resumes."""

    done: Callable[[int, int], None]  # examples more trained on, people finished so far
    resumed: Done  # examples that an interrupted run trained on
    stop: Callable[[], None]  # may raise, after the method has saved what it wants to keep
    checkpoint: Path  # the method's own file; the run removes it once the states are saved


@dataclass(frozen=True)
class Fitted(Generic[State]):
    state: State
    losses: tuple[float, ...] = ()  # of every step
    seconds: float = 0.0


@dataclass(frozen=True)
class QueryRequest(Generic[State]):
    """A query, and the state that answers it."""

    user_id: str
    query: Query
    state: State
    sampling: Sampling


class Method(ABC, Generic[State]):
    name: ClassVar[str]
    options: ClassVar[frozenset[str]] = frozenset()  # fields of the request that this method alone reads
    shared_modes: ClassVar[tuple[str, ...]] = ("base",)  # the keys of `shared`, known before `prepare`
    learns: ClassVar[bool] = True  # false: `fit` is never called, and nobody has a state of their own
    state_file: ClassVar[str] = "state.bin"  # in a user's folder

    def __init__(self, request: LampRequest, data: TaskData) -> None:
        self.request, self.data = request, data

    @classmethod
    def modes(cls) -> tuple[str, ...]:
        """Of results.MODES, those that a run of several people can measure."""
        return (*cls.shared_modes, *(("personal", "other") if cls.learns else ()))

    @classmethod
    def check(cls, request: LampRequest) -> None:
        """Raise InvalidInput on options that do not go together. Runs before anything is read."""

    @property
    def together(self) -> int:
        """How many people `fit_cohort` gets at once. Their states are saved when it returns."""
        return 1

    @property
    @abstractmethod
    def parameters(self) -> int:
        """Numbers that fitting one person learns; 0 where a state is text."""

    @property
    @abstractmethod
    def settings(self) -> Mapping[str, Any]:
        """What decides the figures besides what every method has, plain JSON values."""

    @abstractmethod
    def prepare(self, stop: Callable[[], bool]) -> float:
        """Load or train what everybody shares; the seconds that its training took."""

    @property
    @abstractmethod
    def start(self) -> State:
        """Where everybody starts, and where people without a history stay."""

    @property
    @abstractmethod
    def shared(self) -> Mapping[str, State]:
        """States that are nobody's own, by the mode (results.MODES) in which they are measured."""

    @abstractmethod
    def fit(self, person: Person, context: FitContext) -> Fitted[State]:
        """Learn from this person alone: the result must not depend on who was fitted before."""

    def fit_cohort(self, people: Sequence[Person], context: FitContext) -> list[Fitted[State]]:
        """`fit` of several. One that trains people side by side must leave no trace of one in another."""
        return [self.fit(person, context) for person in people]

    def can_fit(self, person: Person) -> bool:
        """Whether the history is enough to learn from."""
        return bool(person.history)

    def examples(self, person: Person) -> int:
        """How many examples fitting this person goes through. Progress estimates the time left by it."""
        return len(person.history)

    def announce(self, people: Sequence[Person]) -> str:
        """A line on how these people will be fitted; empty for none."""
        return ""

    @abstractmethod
    def answer(self, requests: Sequence[QueryRequest[State]], done: Done) -> list[str]:
        """The texts that follow the prompts. What shares a batch may depend on `requests` alone."""

    @abstractmethod
    def score(
        self, requests: Sequence[QueryRequest[State]], answers: Sequence[str] | None = None
    ) -> list[Score]:
        """Log-likelihood of an answer to each query: the gold ones, or such as the labels of a task."""

    @abstractmethod
    def to_bytes(self, state: State) -> bytes: ...

    @abstractmethod
    def from_bytes(self, data: bytes) -> State:
        """Raises PerfitError on what `to_bytes` did not make."""

    def close(self) -> None:
        """Give the model back as it was."""
