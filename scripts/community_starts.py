"""Held-out losses of people with few examples: at the plain seed, at the start that suits them, and updated.

    python scripts/community_starts.py --model smollm2 --artefact artefacts/commit_message --data commits \\
        --out starts.jsonl --update plain --sizes 10
    python scripts/community_starts.py … --out starts.jsonl --update chosen --sizes 10
    python scripts/community_starts.py … --out starts.jsonl --table

People are those of `user_top_100_history.json`, whom no artefact has seen; a person with n examples has the
latest n of their history, and is tested on their queries. Lines are appended to OUT, and what it holds is
not measured again, so an interrupted run goes on, and two with different --update may share the work.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import wilcoxon

from perfit_cloud.collective.encoding import Encoder
from perfit_cloud.collective.personal import scores_by_start, train_people
from perfit_cloud.engine.gradients.batch import Pair
from perfit_cloud.engine.gradients.session import GradientRequest, UpdateEngine
from perfit_cloud.model.artefacts import Artefact
from perfit_cloud.model.base import load_base
from perfit_shared.lamp import read_users
from perfit_shared.shifts import ShiftTensors
from perfit_shared.splits import split_sizes
from perfit_shared.starts import choose_start
from perfit_shared.training import Training, schedule_for
from perfit_shared.types import Score
from perfit_shared.validation import mean_loss

_CACHE = 1 << 29  # bytes


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--artefact", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="folder with a user_top_100_history.json")
    parser.add_argument("--out", type=Path, required=True, help="JSONL file")
    parser.add_argument("--update", choices=("none", "plain", "chosen"), default="none")
    parser.add_argument("--sizes", default="5,10,25", help="examples that a person has")
    parser.add_argument("--users", type=int, default=24, help="evenly out of all")
    parser.add_argument("--test", type=int, default=16, help="queries of a person")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--table", action="store_true", help="print what OUT holds; measure nothing")
    return parser.parse_args()


class Measure:
    """Measures people one by one."""

    def __init__(self, given: argparse.Namespace) -> None:
        self._given = given
        base = load_base(given.model)
        self._artefact = Artefact.load(given.artefact)
        self._engine = UpdateEngine(base, keep_bytes=_CACHE)
        self._encoder = Encoder(base, self._artefact.task)
        people = read_users(given.data / "user_top_100_history.json", self._artefact.task).users
        every = np.linspace(0, len(people) - 1, min(given.users, len(people))).astype(int)
        self._people = [people[i] for i in every]
        self._sizes = sorted(map(int, given.sizes.split(",")))

    def run(self) -> Iterator[dict[str, Any]]:
        done = {_key(line) for line in read(self._given.out)}
        for person in self._people:
            history = self._pairs(person.profile[-self._sizes[-1] :])
            test = self._pairs(person.query[: self._given.test])
            missing = [size for size in self._sizes if (person.user_id, size, self._given.update) not in done]
            if self._given.update == "none" and missing:
                yield {"user": person.user_id, "size": self._sizes[-1], "update": "none"} | self._scores(
                    history, test
                )
            elif missing:
                for size in missing:
                    found = self._updated(history[-size:], test)
                    yield {"user": person.user_id, "size": size, "update": self._given.update} | found

    def _pairs(self, entries: Sequence[Any]) -> list[Pair]:
        return [found.pair for found in self._encoder.examples([entry.item for entry in entries])]

    def _scores(self, history: list[Pair], test: list[Pair]) -> dict[str, Any]:
        """Of every start: the (log-likelihood, tokens) of each example and each query."""
        found = scores_by_start(self._engine, self._artefact, [*history, *test])
        parts = [[(score.log_likelihood, score.tokens) for score in scores] for scores in found]
        return {
            "history": [scores[: len(history)] for scores in parts],
            "test": [scores[len(history) :] for scores in parts],
        }

    def _updated(self, history: list[Pair], test: list[Pair]) -> dict[str, Any]:
        """The loss on the queries after an update as a device makes it."""
        start = self._artefact.seed
        if self._given.update == "chosen":
            start = self._artefact.starts[
                choose_start(scores_by_start(self._engine, self._artefact, history))
            ]
        train, gate, _ = split_sizes(len(history), test_apart=True)
        schedule = schedule_for("device", self._artefact, train, held_out=gate)
        trainings = [Training.start(schedule, start)]
        for _ in train_people(self._engine, self._artefact, [history], trainings):
            pass
        outcome = trainings[0].outcome(start)
        return {
            "taken": outcome is not None,
            "loss": self._loss(test, outcome or start),
            "last": self._loss(test, trainings[0].tensors),
        }

    def _loss(self, pairs: list[Pair], tensors: ShiftTensors) -> float:
        with self._engine.open(pairs, self._artefact) as opened:
            ((loss, _tokens),) = self._engine.losses([GradientRequest(opened, range(len(pairs)), tensors)])
        return loss


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _key(line: dict[str, Any]) -> tuple[str, int, str]:
    return line["user"], line["size"], line["update"]


def table(lines: Sequence[dict[str, Any]], sizes: Sequence[int]) -> Iterator[dict[str, Any]]:
    """One row a size: mean losses, and Wilcoxon's p of pairs of them over the people who have both."""
    scored = {line["user"]: line for line in lines if line["update"] == "none"}
    for size in sizes:
        of: dict[str, dict[str, float]] = {"plain": {}, "chosen": {}}
        others = 0
        for user, line in scored.items():
            chosen = choose_start([_scored(scores[-size:]) for scores in line["history"]]) if size else 0
            others += chosen > 0
            of["plain"][user] = mean_loss(_scored(line["test"][0]))
            of["chosen"][user] = mean_loss(_scored(line["test"][chosen]))
        for update in ("plain", "chosen"):
            found = [line for line in lines if line["update"] == update and line["size"] == size]
            of[f"{update} + update"] = {line["user"]: line["loss"] for line in found}
        row: dict[str, Any] = {"examples": size, "people": len(scored), "not the plain seed": others}
        row |= {name: _mean(list(losses.values())) for name, losses in of.items() if losses}
        for a, b in (
            ("chosen", "plain"),
            ("chosen", "plain + update"),
            ("chosen + update", "plain + update"),
            ("chosen + update", "chosen"),
            ("plain + update", "plain"),
        ):
            both = [user for user in of[a] if user in of[b]]
            gaps = [of[a][user] - of[b][user] for user in both]
            if any(gaps):
                p = float(wilcoxon(gaps).pvalue)
                row[f"{a} − {b}"] = f"{_mean(gaps)} of {len(both)}, p {p:.2g}"
        yield row


def _scored(pairs: Sequence[tuple[float, int]]) -> list[Score]:
    return [Score(log_likelihood, tokens) for log_likelihood, tokens in pairs]


def _mean(values: Sequence[float]) -> float:
    return round(float(np.mean(values)), 4)


def main() -> None:
    given = arguments()
    torch.set_num_threads(given.threads)
    if given.table:
        for row in table(read(given.out), [0, *map(int, given.sizes.split(","))]):
            print(json.dumps(row, ensure_ascii=False))
        return
    for line in Measure(given).run():
        with given.out.open("a") as file:
            file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
