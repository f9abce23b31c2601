"""How an update may end: held-out losses of mixes and means of the shifts that one training passes through.

    python scripts/update_endings.py --model smollm2 --artefact artefacts/commit_message --data commits \\
        --out runs/endings --people 0::2
    python scripts/update_endings.py … --out runs/endings --people 0::2 --table

People are those of `user_top_100_history.json`, whom no artefact has seen, by their place in the file. Each
is trained as on a device. OUT gets a line a person (`people.jsonl`), figures only, and the tensors of every
judged epoch, so that an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import wilcoxon

from perfit_cloud.collective.encoding import Encoder
from perfit_cloud.collective.personal import train_people
from perfit_cloud.engine.gradients.batch import Pair
from perfit_cloud.engine.gradients.session import GradientRequest, UpdateEngine
from perfit_cloud.lamp.people import Learner, Person, read_people
from perfit_cloud.model.artefacts import Artefact
from perfit_cloud.model.base import load_base
from perfit_shared.mixes import between
from perfit_shared.shifts import LayerShift, ShiftTensors
from perfit_shared.splits import split_sizes
from perfit_shared.training import Schedule, Training, schedule_for
from perfit_shared.types import Score
from perfit_shared.validation import Comparison, chosen_by_others, mean_loss

_CACHE = 2 << 30  # bytes
_FORMS = 5  # people for whom the ways to mix are compared
_LINES = "people.jsonl"
_BEFORE = "best epoch"  # which updates went to
_SHARES = (0.25, 0.5, 0.75)  # of the shift in a mix with the seed


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--artefact", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="folder with a user_top_100_history.json")
    parser.add_argument("--out", type=Path, required=True, help="folder")
    parser.add_argument("--people", default="::", help="first:end:step, as a slice of Python")
    parser.add_argument("--table", action="store_true", help="print what OUT holds; measure nothing")
    return parser.parse_args()


# -- mixes -------------------------------------------------------------------------------------------


def mixed(parts: Sequence[tuple[float, ShiftTensors]]) -> ShiftTensors:
    """The shift of the same rank whose effect is nearest to the weighted sum of these shifts' effects.

    φ(x) − x = Rᵀ(Cx + b) with C = W − R, so the effects sum to Σ w Rᵀ[C b], d × (d + 1), whose truncated
    singular value decomposition U S Vᵀ is the nearest of its rank: R = Uᵀ, whose rows are orthonormal, and
    [C b] = S Vᵀ.
    """
    layers = {}
    for layer, (rotation, _, _) in parts[0][1].layers.items():
        shifts = [(weight, tensors.layers[layer]) for weight, tensors in parts]
        left = np.vstack([shift.rotation for _, shift in shifts]).astype(np.float64)
        right = np.vstack([weight * _inner(shift) for weight, shift in shifts])
        (q_left, t_left), (q_right, t_right) = np.linalg.qr(left.T), np.linalg.qr(right.T)
        u, s, v = np.linalg.svd(t_left @ t_right.T)
        rank = len(rotation)
        turned = (q_left @ u[:, :rank]).T
        inner = s[:rank, None] * (v[:rank] @ q_right.T)
        layers[layer] = _layer(turned, inner)
    return ShiftTensors(layers)


def joined(parts: Sequence[tuple[float, ShiftTensors]]) -> ShiftTensors:
    """The weighted sum of the effects itself, at the sum of the ranks; its R has no orthonormal rows."""
    layers = {}
    for layer in parts[0][1].layers:
        shifts = [(weight, tensors.layers[layer]) for weight, tensors in parts]
        rotation = np.vstack([shift.rotation for _, shift in shifts]).astype(np.float64)
        layers[layer] = _layer(rotation, np.vstack([weight * _inner(shift) for weight, shift in shifts]))
    return ShiftTensors(layers)


def _inner(shift: LayerShift) -> np.ndarray[Any, np.dtype[np.float64]]:
    """[C b] (r, d + 1)"""
    change = shift.source.astype(np.float64) - shift.rotation
    return np.hstack([change, shift.bias[:, None]])


def _layer(rotation: np.ndarray[Any, Any], inner: np.ndarray[Any, Any]) -> LayerShift:
    source = rotation + inner[:, :-1]
    return LayerShift(*(part.astype(np.float32) for part in (rotation, source, inner[:, -1])))


def mean(shifts: Sequence[ShiftTensors]) -> ShiftTensors:
    return mixed([(1 / len(shifts), shift) for shift in shifts])


# -- one person --------------------------------------------------------------------------------------

Judged = dict[int, ShiftTensors]  # by step


class Measure:
    """Trains people one by one, and scores what each training passed through."""

    def __init__(self, given: argparse.Namespace) -> None:
        self._given = given
        base = load_base(given.model)
        self._artefact = Artefact.load(given.artefact)
        spec = replace(self._artefact.spec, personal_rank=2 * self._artefact.spec.personal_rank)
        self._wide = replace(self._artefact, spec=spec)  # for `joined`
        self._engine = UpdateEngine(base, keep_bytes=_CACHE)
        self._encoder = Encoder(base, self._artefact.task)
        self._people = read_people(given.data, self._artefact.task, base).people

    def run(self) -> Iterator[dict[str, Any]]:
        done = {line["person"] for line in read(self._given)}
        for index in chosen(self._given, len(self._people)):
            if index not in done:
                yield {"person": index} | self._of(index, self._people[index])

    def _of(self, index: int, person: Person) -> dict[str, Any]:
        began = time.process_time()
        history = Learner.of(person, self._encoder).history
        queries = [self._encoder.query(query.item).pair for query in person.queries]
        training, judged = self._trained(self._given.out / f"{index}.npz", history)
        trained = time.process_time() - began
        examples = [*history, *queries]
        rows = range(len(history), len(examples))
        found = {}
        with self._engine.open(examples, self._artefact) as opened:
            for step, scores in training.judgements:
                if step <= training.best_step or step == training.judged:
                    asked = GradientRequest(opened, rows, judged[step])
                    found[f"step {step}"] = [_plain(self._engine.scores([asked])[0]), _plain(scores)]
            for name, shift in endings(training, judged, self._artefact.seed).items():
                (judges,) = training.schedule.judged
                requests = [GradientRequest(opened, part, shift) for part in (rows, judges)]
                found[name] = [_plain(scores) for scores in self._engine.scores(requests)]
        if index < _FORMS:
            found |= self._forms(judged[training.best_step], queries)
        return {
            "train": training.schedule.examples,
            "steps": training.step,
            "best": training.best_step,
            "taken": training.comparison.is_better,
            "scores": found,
            "train seconds": round(trained, 1),
            "seconds": round(time.process_time() - began, 1),
        }

    def _trained(self, path: Path, history: Sequence[Pair]) -> tuple[Training[Schedule], Judged]:
        if path.exists():
            return _loaded(path)
        train, gate, _ = split_sizes(len(history), test_apart=True)
        schedule = schedule_for("device", self._artefact, train, held_out=gate)
        trainings, judged = [Training.start(schedule, self._artefact.seed)], Judged()
        for _ in train_people(self._engine, self._artefact, [history], trainings):
            now = trainings[0]
            if now.judged == now.step:
                judged[now.step] = now.tensors
        _save(path, trainings[0], judged)
        return trainings[0], judged

    def _forms(self, best: ShiftTensors, queries: Sequence[Pair]) -> dict[str, Any]:
        """The queries' scores half-way from the seed, by the three ways to mix."""
        seed, rows = self._artefact.seed, range(len(queries))
        parts, found = [(0.5, best), (0.5, seed)], {}
        forms = {
            "joined": (joined(parts), self._wide),
            "mixed": (mixed(parts), self._artefact),
            "between": (between(seed, best, 0.5), self._artefact),
        }
        for form, (shift, artefact) in forms.items():
            with self._engine.open(queries, artefact) as opened:
                scores = self._engine.scores([GradientRequest(opened, rows, shift)])[0]
            found[f"half, {form}"] = [_plain(scores), []]
        return found


def _save(path: Path, training: Training[Schedule], judged: Judged) -> None:
    arrays: dict[str, Any] = {"training": np.frombuffer(training.to_bytes(), np.uint8)}
    for step, tensors in judged.items():
        arrays |= {f"{step}/{name}": array for name, array in tensors.named()}
    with path.with_suffix(".part").open("wb") as file:
        np.savez(file, **arrays)
    path.with_suffix(".part").replace(path)


def _loaded(path: Path) -> tuple[Training[Schedule], Judged]:
    named: dict[int, dict[str, Any]] = {}
    with np.load(path) as arrays:
        training = Training.from_bytes(arrays["training"].tobytes(), Schedule)
        for key in arrays.files:
            if key != "training":
                step, name = key.split("/")
                named.setdefault(int(step), {})[name] = arrays[key]
    return training, {step: ShiftTensors.from_named(tensors) for step, tensors in sorted(named.items())}


def endings(training: Training[Schedule], judged: Judged, seed: ShiftTensors) -> dict[str, ShiftTensors]:
    """By name: the shift to answer with."""
    steps = sorted(judged)
    best = steps.index(training.best_step)
    sets = {"last 3": steps[-3:], "around 3": steps[max(0, best - 1) : best + 2]}
    sets |= {"to best": steps[: best + 1], "all": steps}
    found = {f"mean {name}": mean([judged[step] for step in of]) for name, of in sets.items()}
    for share in _SHARES:
        for name, of in (("best", judged[steps[best]]), ("last", judged[steps[-1]])):
            found[f"{share} of {name}"] = between(seed, of, share)
    return found


# -- lines -------------------------------------------------------------------------------------------


def chosen(given: argparse.Namespace, count: int) -> Sequence[int]:
    first, end, step = (int(part) if part else None for part in (*given.people.split(":"), "", "")[:3])
    return range(count)[first:end:step]


def read(given: argparse.Namespace) -> list[dict[str, Any]]:
    path = given.out / _LINES
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _plain(scores: Sequence[Score]) -> list[tuple[float, int]]:
    return [(round(score.log_likelihood, 4), score.tokens) for score in scores]


# -- table -------------------------------------------------------------------------------------------

Losses = dict[str, float]  # on the queries, by ending


def losses(line: Mapping[str, Any]) -> Losses:
    """Of one person, by every ending. An ending keeps the seed where the gate refuses it."""
    test, judges = ({name: _scored(found[i]) for name, found in line["scores"].items()} for i in (0, 1))
    seed, best = "step 0", f"step {line['best']}"
    loss = {name: mean_loss(scores) for name, scores in test.items()}
    passes = line["taken"]
    steps = [name for name in loss if name.startswith("step ")]
    found = {"seed": loss[seed], _BEFORE: loss[best if passes else seed], "best, no gate": loss[best]}
    found["last, no gate"] = loss[steps[-1]]
    for name, its in loss.items():
        if name.startswith(("mean ", "0.")):
            found[f"{name}, no gate"] = its
            found[name] = its if passes else loss[seed]
            own = Comparison(judges[seed], judges[name]).is_better
            found[f"{name}, own gate"] = its if own else loss[seed]
    shares = [seed, *(name for share in _SHARES if (name := f"{share} of best") in loss), best]
    for what, of in (("share", shares), ("epoch", steps)):
        least = min(of, key=lambda name: mean_loss(judges[name]))
        near = [name for name in of if not Comparison(judges[name], judges[least]).is_better]
        others = Comparison(judges[seed], chosen_by_others([judges[name] for name in of])).is_better
        found[f"{what} of least loss"] = loss[least if others else seed]
        found[f"least {what} within an error"] = loss[near[0]]
    return found


def _scored(pairs: Sequence[tuple[float, int]]) -> list[Score]:
    return [Score(log_likelihood, tokens) for log_likelihood, tokens in pairs]


def table(lines: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """A row an ending: means over people, and against the best epoch Wilcoxon's signed ranks."""
    found = [losses(line) for line in lines]
    yield (
        f"| ending, {len(found)} people | loss | against the {_BEFORE} | better, worse | p "
        "| against the seed | better, worse, worst |"
    )
    yield "|---|---|---|---|---|---|---|"
    for name in found[0]:
        its = [each[name] for each in found]
        gaps = np.array(
            [
                [its_loss - each[_BEFORE], its_loss - each["seed"]]
                for its_loss, each in zip(its, found, strict=True)
            ]
        )
        p = wilcoxon(gaps[:, 0]).pvalue if gaps[:, 0].any() else 1.0
        (better, seed_better), (worse, seed_worse) = (gaps < 0).sum(0), (gaps > 0).sum(0)
        loss, (gap, seed_gap) = np.mean(its), gaps.mean(0)
        yield (
            f"| {name} | {loss:.3f} | {gap:+.3f} | {better}, {worse} | {p:.2g} "
            f"| {seed_gap:+.3f} | {seed_better}, {seed_worse}, {gaps[:, 1].max():+.3f} |"
        )


def print_table(given: argparse.Namespace) -> None:
    lines = read(given)
    people = chosen(given, 1 + max(line["person"] for line in lines))
    print(*table([line for line in lines if line["person"] in people]), sep="\n")


def main() -> None:
    given = arguments()
    torch.set_num_threads(1)
    if given.table:
        print_table(given)
        return
    given.out.mkdir(parents=True, exist_ok=True)
    for line in Measure(given).run():
        with (given.out / _LINES).open("a") as file:
            file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
