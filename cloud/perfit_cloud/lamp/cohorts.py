"""What is done with one cohort of people: fit a state for each, then measure losses and answers.

`run` does this for every cohort in its own process, or `ray_workers` in several. A cohort's files in OUT
depend on its people alone, not on who does it, when, or beside whom.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

from perfit_cloud.lamp.methods.interface import FitContext, Method, QueryRequest, TaskData
from perfit_cloud.lamp.people import Person, swap_histories
from perfit_cloud.lamp.request import LampRequest
from perfit_cloud.lamp.results import QueryResult, UserFolder, UserResult
from perfit_cloud.lamp.scores import is_text
from perfit_cloud.lamp.text_scores import frequent_words, origins_of
from perfit_shared.errors import InvalidData, PerfitError

__all__ = ["STOPPED", "CohortWork"]

STOPPED = "stopped; the same command goes on from there"


class CohortWork:
    """One run with everything loaded."""

    def __init__(
        self, request: LampRequest, data: TaskData, method: Method[Any], stop: Callable[[], None]
    ) -> None:
        """`stop` is called between steps and may raise; what is finished by then is kept."""
        self._request, self._data, self._method, self._stop = request, data, method, stop
        people = data.people.people
        self.people = people if request.histories == "own" else swap_histories(people)
        self._own = {person.user_id: person for person in people}  # with their own histories
        after = [*self.people[1:], self.people[0]]
        self._next = {one.user_id: other for one, other in zip(self.people, after, strict=True)}

    def folder(self, person: Person) -> UserFolder:
        return UserFolder(self._request.out, person.user_id, self._method.state_file)

    def fit(
        self, cohort: Sequence[Person], done: Callable[[int, int], None], resumed: Callable[[int], None]
    ) -> None:
        """Save a state for everyone. `done` and `resumed` as in FitContext."""
        # One file for each cohort: several may be under way.
        checkpoint = self.folder(cohort[0]).path / "stage2.bin"
        fitted = self._method.fit_cohort(cohort, FitContext(done, resumed, self._stop, checkpoint))
        for person, one in zip(cohort, fitted, strict=True):
            state = self._method.to_bytes(one.state)
            self.folder(person).save_state(state, losses=one.losses, seconds=one.seconds)
        checkpoint.unlink(missing_ok=True)

    def measure(self, cohort: Sequence[Person], mode: str, done: Callable[[int], None]) -> None:
        """Save everyone's losses and answers in one of results.MODES. `done` gets counts of queries."""
        began, task, method = time.monotonic(), self._data.task, self._method
        requests = []
        for person in cohort:
            state = self.state(person, mode)
            for query in person.queries:
                sampling = self._request.decoding.sampling(task, person.user_id, query)
                requests.append(QueryRequest(person.user_id, query, state, sampling))
        scores = method.score(requests)
        answers = method.answer(requests, done)
        origins = (origin for person in cohort for origin in self._origins(person))
        results = (
            QueryResult(
                one.query.id,
                one.query.gold,
                score.tokens,
                loss={mode: -score.log_likelihood / score.tokens},
                answers={mode: task.parse(answer)},
                origins=origin,
            )
            for one, score, answer, origin in zip(requests, scores, answers, origins, strict=True)
        )
        own = [tuple(islice(results, len(person.queries))) for person in cohort]
        seconds = (time.monotonic() - began) / len(cohort)
        for person, queries in zip(cohort, own, strict=True):
            folder = self.folder(person)
            folder.add_mode(UserResult(person.user_id, len(person.history), folder.steps, queries), seconds)

    def take_known(self, person: Person, mode: str, known: Sequence[QueryResult]) -> None:
        """Save these results of one of results.MODES as measured, where none are yet."""
        folder = self.folder(person)
        if not folder.has_measured(mode):
            origins = self._origins(person)
            queries = tuple(replace(q, origins=o) for q, o in zip(known, origins, strict=True))
            folder.add_mode(UserResult(person.user_id, len(person.history), folder.steps, queries), 0.0)

    def state(self, person: Person, mode: str) -> Any:
        """What answers this person in one of results.MODES."""
        if mode in self._method.shared:
            return self._method.shared[mode]
        owner = person if mode == "personal" else self._next[person.user_id]
        folder = self.folder(owner)
        if not folder.has_state:
            return self._method.start
        try:
            return self._method.from_bytes(folder.state_path.read_bytes())
        except PerfitError as error:
            raise InvalidData(f"{folder.state_path}: {error}; remove it and run again") from error

    def _origins(self, person: Person) -> list[str | None]:
        """Of each query's gold, where its words come from; None where answers are no free texts."""
        task = self._data.task
        if not is_text(task):
            return [None] * len(person.queries)
        gold = task.gold_field
        frequent = frequent_words(item[gold] for item in self._own[person.user_id].history)
        return [
            origins_of(query.gold, (text for name, text in query.item.items() if name != gold), frequent)
            for query in person.queries
        ]
