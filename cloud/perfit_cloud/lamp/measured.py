"""What was measured of each user, as sums over their queries: every reported number follows from these.

    RUN/figures.json    a run without its texts, by `perfit-cloud lamp figures`; format 1

A file of figures holds no answer, no text of a person and no id. A user is known by a digest of who
they are and what they were asked, so that two runs of the same people can still be paired.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from perfit_cloud.lamp import scores, text_scores
from perfit_shared.errors import InvalidData
from perfit_shared.tasks import Task

if TYPE_CHECKING:
    from perfit_cloud.lamp.results import UserResult

__all__ = ["FIGURES_FILE", "ModeFigures", "UserFigures", "check_alike"]

FIGURES_FILE = "figures.json"
_DIGESTS, _COUNTS = ("asked", "counted"), ("queries", "tokens", "examples", "steps")


@dataclass(frozen=True)
class ModeFigures:
    """One user in one mode."""

    loss: float  # mean nats over all target tokens
    sums: Mapping[str, scores.Array]  # by metric, (K,): `scores.parts` and `text_scores.text_parts` added up

    def to_json(self) -> dict[str, Any]:
        sums = {name: [_plain(x) for x in row] for name, row in self.sums.items()}
        return {"loss": _plain(self.loss), "sums": sums}


@dataclass(frozen=True)
class UserFigures:
    user_id: str  # "" where it is not to be told
    asked: str  # digest of the id, the queries and what answers are compared with
    counted: str  # digest of how many tokens each target has
    queries: int
    tokens: int  # of all targets
    examples: int  # of the history, trained on
    steps: int  # of stage 2
    modes: Mapping[str, ModeFigures]

    @classmethod
    def of(cls, task: Task, user: UserResult, modes: Iterable[str]) -> Self:
        """Raises InvalidData for a user without queries."""
        queries = user.queries
        if not queries:
            raise InvalidData(f"no held-out queries to measure on: {user.user_id}; every user needs one")
        return cls(
            user.user_id,
            _digest([user.user_id, *([query.id, query.gold.strip()] for query in queries)]),
            _digest([query.tokens for query in queries]),
            len(queries),
            sum(query.tokens for query in queries),
            user.examples,
            user.steps,
            {mode: _measured(task, user, mode) for mode in modes},
        )

    def to_json(self) -> dict[str, Any]:
        """Without the id."""
        own = {name: getattr(self, name) for name in _DIGESTS + _COUNTS}
        return {**own, "modes": {mode: one.to_json() for mode, one in self.modes.items()}}

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Self:
        """Raises KeyError, TypeError or ValueError on anything else."""
        modes = {
            str(mode): ModeFigures(
                _number(one["loss"]),
                {str(name): np.array([*map(_number, row)]) for name, row in one["sums"].items()},
            )
            for mode, one in raw["modes"].items()
        }
        queries, tokens, examples, steps = (int(raw[name]) for name in _COUNTS)
        return cls("", str(raw["asked"]), str(raw["counted"]), queries, tokens, examples, steps, modes)


def check_alike(users: Sequence[UserFigures], task: Task) -> None:
    """Raise ValueError unless all have the same modes, and every metric of the task by sums of its length."""
    metrics = {name: table.shape[1] for name, table in scores.parts(task, ["1"], ["1"]).items()}
    lengths = dict(metrics)
    for user in users:
        if user.modes.keys() != users[0].modes.keys():
            raise ValueError("users with other modes")
        if not user.modes or not all(metrics.keys() <= one.sums.keys() for one in user.modes.values()):
            raise ValueError("a metric is missing")
        for name, sums in (pair for one in user.modes.values() for pair in one.sums.items()):
            if len(sums) != lengths.setdefault(name, len(sums)):
                raise ValueError("sums of another length")


def _measured(task: Task, user: UserResult, mode: str) -> ModeFigures:
    answers, golds = [q.answers[mode] for q in user.queries], [q.gold for q in user.queries]
    tables = dict(scores.parts(task, answers, golds))
    if scores.is_text(task):
        tables |= text_scores.text_parts(answers, golds, [query.origins for query in user.queries])
    return ModeFigures(user.loss(mode), {name: table.sum(0) for name, table in tables.items()})


def _plain(value: float) -> float | int | None:
    """Counts without a point, and None for what JSON lacks."""
    if not math.isfinite(value):
        return None
    return int(value) if value == int(value) else float(value)


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _digest(of: Sequence[Any]) -> str:
    return hashlib.sha256(json.dumps(of).encode()).hexdigest()[:32]
