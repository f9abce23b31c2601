"""What an update gives at few examples: losses on the examples behind them, with the seed and with the shift.

    python scripts/small_histories.py --model newslm --artefact artefacts/news_headline \\
        --data lamp_news/news_headline --sizes 10,20,40 --users 12

People are those of `user_others.json` with enough examples; an artefact that was trained on them flatters
itself. `rejected` counts updates that were kept out, for which the shift is the seed; `worse` those that
were let in and are worse than the seed on the examples behind.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

from perfit_cloud.collective.encoding import Encoder
from perfit_cloud.collective.personal import train_people
from perfit_cloud.engine.gradients.batch import Pair
from perfit_cloud.engine.gradients.session import GradientRequest, UpdateEngine
from perfit_cloud.model.artefacts import Artefact
from perfit_cloud.model.base import load_base
from perfit_shared.lamp import read_users
from perfit_shared.shifts import ShiftTensors
from perfit_shared.splits import split_sizes
from perfit_shared.training import Overrides, Training, schedule_for


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--artefact", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="folder with a user_others.json")
    parser.add_argument("--sizes", default="10,20", help="examples to learn from, the gate's among them")
    parser.add_argument("--users", type=int, default=12)
    parser.add_argument("--skip", type=int, default=0, help="people")
    parser.add_argument("--test", type=int, default=15, help="most examples behind those, and at least 4")
    parser.add_argument("--rate", type=float, help="the artefact's by default")
    parser.add_argument("--dtype", default="auto")
    return parser.parse_args()


class Measure:
    def __init__(self, given: argparse.Namespace) -> None:
        self._given = given
        base = load_base(given.model, dtype=given.dtype)
        self._artefact = Artefact.load(given.artefact)
        self._engine = UpdateEngine(base, keep_bytes=2 << 30)
        encoder = Encoder(base, self._artefact.task)
        found = read_users(given.data / "user_others.json", self._artefact.task)
        rows = [[e.item for e in (user.profile or user.query)] for user in found.users]
        least = max(map(int, given.sizes.split(","))) + 4
        rows = [items for items in rows if len(items) >= least]
        rows = rows[given.skip : given.skip + given.users]
        self._people = [[encoded.pair for encoded in encoder.examples(items)] for items in rows]

    def of(self, size: int) -> dict[str, object]:
        began, seed, count = time.process_time(), self._artefact.seed, len(self._people)
        past = [pairs[:size] for pairs in self._people]
        tests = [pairs[size : size + self._given.test] for pairs in self._people]
        train, gate, _ = split_sizes(size, test_apart=True)
        overrides = Overrides(learning_rate=self._given.rate)
        schedule = schedule_for("device", self._artefact, train, overrides, held_out=gate)
        trainings = [Training.start(schedule, seed) for _ in past]
        for _ in train_people(self._engine, self._artefact, past, trainings):
            pass
        before = [self._loss(test, seed) for test in tests]
        after = [self._loss(test, t.outcome(seed) or seed) for test, t in zip(tests, trainings, strict=True)]
        best = [self._loss(test, t.best or seed) for test, t in zip(tests, trainings, strict=True)]
        last = [self._loss(test, t.tensors) for test, t in zip(tests, trainings, strict=True)]
        return {
            "examples": size,
            "people": count,
            "folds": schedule.folds,
            "seed": round(sum(before) / count, 4),
            "personal": round(sum(after) / count, 4),
            "without the test of chance": round(sum(best) / count, 4),
            "of the last epoch": round(sum(last) / count, 4),
            "rejected": sum(t.outcome(seed) is None for t in trainings),
            "worse": sum(a > b for a, b in zip(after, before, strict=True)),
            "worse without the test of chance": sum(a > b for a, b in zip(best, before, strict=True)),
            "worse at the last epoch": sum(a > b for a, b in zip(last, before, strict=True)),
            "steps": [t.step for t in trainings],
            "best steps": [t.best_step for t in trainings],
            "gains": [f"{t.comparison.gain:.3f}±{t.comparison.error:.3f}" for t in trainings],
            "tested": [round(b - a, 3) for a, b in zip(best, before, strict=True)],
            "cpu seconds": round(time.process_time() - began, 1),
        }

    def _loss(self, pairs: list[Pair], tensors: ShiftTensors) -> float:
        with self._engine.open(pairs, self._artefact) as opened:
            ((loss, _tokens),) = self._engine.losses([GradientRequest(opened, range(len(pairs)), tensors)])
        return loss


def main() -> None:
    given = arguments()
    torch.set_num_threads(1)
    measure = Measure(given)
    for size in map(int, given.sizes.split(",")):
        print(json.dumps(measure.of(size)), flush=True)


if __name__ == "__main__":
    main()
