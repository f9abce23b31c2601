"""Two runs, or two modes of one, query by query: which is better, by how much, and how sure that is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from perfit_cloud.lamp.measured import UserFigures
from perfit_cloud.lamp.results import MODES, QueryResult, Run, UserResult
from perfit_cloud.lamp.statistics import paired
from perfit_cloud.lamp.summary import Nest, as_json, measure_users, over
from perfit_shared.errors import InvalidData, InvalidInput

__all__ = ["Comparison", "Side", "compare"]

_OWN = ("users", "queries", "unpaired", "same_tokens", "differing")


@dataclass(frozen=True)
class Side:
    """A mode of a run."""

    run: Run
    mode: str

    @classmethod
    def parse(cls, text: str) -> Side:
        """From "DIR" (the personal mode) or "DIR:MODE".

        Raises InvalidInput on a mode that is none or was not measured, InvalidData without a run.
        """
        head, colon, tail = text.rpartition(":")
        folder, mode = Path(text), "personal"
        if colon and tail in MODES:
            folder, mode = Path(head), tail
        elif colon and not folder.is_dir() and Path(head).is_dir():
            raise InvalidInput(f'no mode "{tail}"; there are {", ".join(MODES)}')
        run = Run.load(folder, texts=False)
        if mode not in run.modes:
            raise InvalidInput(f"{folder} did not measure {mode}; it has {', '.join(run.modes)}")
        return cls(run, mode)

    @property
    def name(self) -> str:
        return f"{self.run.folder}:{self.mode}"


@dataclass(frozen=True)
class Comparison:
    """`against`: a summary's nest of `statistics.Paired`, a − b."""

    a: Side
    b: Side
    users: int  # paired
    queries: int  # paired
    unpaired: Mapping[str, Mapping[str, int]]  # "users" (with their queries) and "queries" (of paired users)
    same_tokens: bool  # else the two count different tokens, and their losses cannot be compared
    differing: Mapping[
        str, tuple[str, str]
    ]  # prompts, reading, decoding, schedule, where they differ: a's, b's
    against: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in _OWN}
        sides = {side: {"run": str(of.run.folder), "mode": of.mode} for side, of in self._sides.items()}
        return dict(as_json({"task": self.a.run.task.name, **sides, **own, **self.against}))

    def warnings(self) -> list[str]:
        """What a reader of the figures should know."""
        lines = [
            f"{self.unpaired[what][side]} {what} only in {of.name}, left out"
            for side, of in self._sides.items()
            for what in ("users", "queries")
            if self.unpaired[what][side]
        ]
        if not self.same_tokens:
            lines.append("the two runs count different tokens, so their losses cannot be compared")
        return lines + [
            f"the two runs differ in {name} ({a}; {b}), which their answers follow as well"
            for name, (a, b) in self.differing.items()
        ]

    @property
    def _sides(self) -> dict[str, Side]:
        return {"a": self.a, "b": self.b}


def compare(a: Side, b: Side) -> Comparison:
    """Pair by user id and query id; a query or user of one side alone is left out and counted.

    Where one side has no texts, users are paired who were asked the very same.

    Raises InvalidInput when the tasks differ or nothing pairs, InvalidData when a pair's golds differ.
    """
    one, two = a.run.task, b.run.task
    if one.name != two.name:
        raise InvalidInput(
            f"{a.name} is of task {one.name}, {b.name} of {two.name}; compare runs of one task"
        )
    if (one.metric, one.labels) != (two.metric, two.labels):
        raise InvalidInput(f"the two runs' task {one.name} differs in its metric or labels")
    pair = _paired_figures if a.run.kept or b.run.kept else _paired_texts
    left, right, unpaired = pair(a, b)
    if not left:
        raise InvalidInput(
            f"{a.name} and {b.name} share no user with a common query; were they of the same data?"
        )
    of_a, of_b = measure_users(one, left, a.mode), measure_users(two, right, b.mode)
    return Comparison(
        a=a,
        b=b,
        users=len(left),
        queries=_count(left),
        unpaired=unpaired,
        same_tokens=all(x.counted == y.counted for x, y in zip(left, right, strict=True)),
        differing=_differing(a.run, b.run),
        against=over(paired, *_alike(of_a, of_b)),
    )


_Pairs = tuple[Sequence[UserFigures], Sequence[UserFigures], Mapping[str, Mapping[str, int]]]


def _paired_texts(a: Side, b: Side) -> _Pairs:
    """Both sides' users in one order, with the queries that both have, and how many are left out."""
    theirs = {user.user_id: user for user in b.run.users}
    both = [_shared(user, theirs[user.user_id]) for user in a.run.users if user.user_id in theirs]
    users = [(x, y) for x, y in both if x.queries]
    left = [UserFigures.of(a.run.task, x, [a.mode]) for x, _ in users]
    right = [UserFigures.of(b.run.task, y, [b.mode]) for _, y in users]
    ids = {user.user_id for user in left}
    of = {
        "a": [u for u in a.run.users if u.user_id in ids],
        "b": [u for u in b.run.users if u.user_id in ids],
    }
    queries = {side: sum(len(u.queries) for u in users) - _count(left) for side, users in of.items()}
    return left, right, {"users": _left_out(a, b, len(ids)), "queries": queries}


def _paired_figures(a: Side, b: Side) -> _Pairs:
    theirs = {user.asked: user for user in b.run.figures}
    left = [user for user in a.run.figures if user.asked in theirs]
    right = [theirs[user.asked] for user in left]
    return left, right, {"users": _left_out(a, b, len(left)), "queries": {"a": 0, "b": 0}}


def _left_out(a: Side, b: Side, paired_users: int) -> dict[str, int]:
    return {"a": a.run.people - paired_users, "b": b.run.people - paired_users}


def _alike(one: Nest, two: Nest) -> tuple[Nest, Nest]:
    """Both with the measures that both have: an older run's texts tell no words apart."""
    both = [
        {part: {n: v for n, v in nest[part].items() if n in other[part]} for part in nest if part != "loss"}
        for nest, other in ((one, two), (two, one))
    ]
    return {"loss": one["loss"], **both[0]}, {"loss": two["loss"], **both[1]}


def _differing(a: Run, b: Run) -> dict[str, tuple[str, str]]:
    both = {
        "prompts": (a.prompts, b.prompts),
        "reading": (a.reading, b.reading),
        "decoding": (a.decoding, b.decoding),
        "schedule": (a.settings.get("schedule", "none"), b.settings.get("schedule", "none")),
    }
    return {name: (one, two) for name, (one, two) in both.items() if one != two}


def _shared(one: UserResult, two: UserResult) -> tuple[UserResult, UserResult]:
    """The same user with the queries that both have, in one order."""
    theirs: dict[str, QueryResult] = {query.id: query for query in two.queries}
    kept = [(query, theirs[query.id]) for query in one.queries if query.id in theirs]
    for query, other in kept:
        if query.gold.strip() != other.gold.strip():
            raise InvalidData(
                f"query {query.id} of user {one.user_id} has different golds in the two runs; "
                "compare runs of the same data"
            )
    # Both sides' words are told apart in one way, by a's history; of an older run nothing tells.
    known = all(query.origins is not None and other.origins is not None for query, other in kept)
    origins = [query.origins if known else None for query, _ in kept]
    sides = zip(*kept, strict=True) if kept else ((), ())
    ours, theirs_kept = (
        tuple(replace(query, origins=origin) for query, origin in zip(side, origins, strict=True))
        for side in sides
    )
    return replace(one, queries=ours), replace(two, queries=theirs_kept)


def _count(users: Sequence[UserFigures]) -> int:
    return sum(user.queries for user in users)
