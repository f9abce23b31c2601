"""Seeds for communities: people are clustered, and each cluster refines the seed of stage 1 for itself.

φ₁ stays as it is, so personal shifts of the artefact stay valid. A round refines each seed on the older half
of its people's examples, and gives each person the seed with the lowest loss on their newer half; the last
seeds are refined on all examples. Every fifth person of a community judges its seed instead of training it,
so that what is learned of twenty people alone is not taken for what their likes write.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from perfit_cloud.collective.clustering import assign, cluster
from perfit_cloud.collective.progress import Progress
from perfit_cloud.engine.gradients.batch import Pair
from perfit_cloud.engine.gradients.session import GradientRequest, UpdateEngine, UpdateSession
from perfit_cloud.model.artefacts import Artefact
from perfit_shared.errors import Cancelled, InvalidData, InvalidInput
from perfit_shared.files import write_whole
from perfit_shared.shifts import ShiftTensors
from perfit_shared.starts import MOST_STARTS
from perfit_shared.training import Request, Schedule, Training, train
from perfit_shared.types import Score
from perfit_shared.validation import mean_loss

__all__ = ["FILE", "LEAST_PEOPLE", "Communities", "CommunityTraining", "check_communities"]

FILE = "communities.bin"  # of an unfinished run
LEAST_PEOPLE = 7  # of a community, so that its seed is nobody's own; six of them train it
_JUDGE = 5  # every one of so many people judges
_ROUNDS = 1
_ROUND_STEPS, _LAST_STEPS = 20, 30  # at least, of a seed's refinement
_SAVE_SECONDS = 60.0


def check_communities(count: int, people: int) -> None:
    """Raises InvalidInput where so many people cannot make so many communities."""
    if not 2 <= count < MOST_STARTS:
        raise InvalidInput(
            f"communities should be from 2 to {MOST_STARTS - 1}, not {count}; one seed needs none"
        )
    if people < count * LEAST_PEOPLE:
        raise InvalidInput(
            f"{count} communities need {count * LEAST_PEOPLE} people to train on, {LEAST_PEOPLE} each; "
            f"there are {people}"
        )


@dataclass(frozen=True)
class Communities:
    """The seeds that are better than the plain one for people who did not train them."""

    seeds: tuple[ShiftTensors, ...]
    sizes: tuple[int, ...]  # people of each community


@dataclass
class _State:
    """Where a run stands; a function of its arguments up to here."""

    round: int = 0
    groups: list[int] = field(default_factory=list)  # of each person; empty before they are clustered
    trainings: list[Training[Schedule]] = field(default_factory=list)  # of this round, by group


class CommunityTraining:
    """One run over a session with everybody's examples. Raises InvalidInput on counts that cannot be."""

    def __init__(
        self,
        engine: UpdateEngine,
        artefact: Artefact,
        people: Sequence[Sequence[Pair]],
        count: int,
        *,
        seed: int,
        out: Path,
        progress: Progress,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        """`people`: each one's examples, oldest first. `out`: the folder that keeps an unfinished run."""
        check_communities(count, len(people))
        self._engine, self._artefact, self._people = engine, artefact, people
        self._count, self._seed = count, seed
        # The seed is stage 1's, and so is its rate; that of devices is for fewer examples.
        rates = artefact.card.get("hyper_parameters", {})
        self._rate = float(rates.get("learning_rate") or artefact.learning_rate)
        self._path, self._progress, self._stop = out / FILE, progress, stop
        ends = np.cumsum([0, *map(len, people)])
        self._rows = [range(*pair) for pair in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True)]
        self._arguments = self._digest()
        self._saved = time.monotonic()

    @property
    def work(self) -> float:
        """Units, about."""
        examples = sum(map(len, self._people))
        epochs = _ROUNDS * (0.5 + 0.2 * self._count) + 1 + 1
        return examples * epochs

    def run(self) -> Communities:
        """Raises Cancelled on a stop, with the run saved."""
        state = self._resumed()
        pairs = [pair for own in self._people for pair in own]
        with self._engine.open(pairs, self._artefact) as session:
            if not state.groups:
                state.groups = self._cluster(session)
                self._save(state)
            while state.round < _ROUNDS:
                trainings = self._refine(session, state, [_older(rows) for rows in self._rows], _ROUND_STEPS)
                groups = self._assign(session, [each.best or self._artefact.seed for each in trainings])
                moved = sum(a != b for a, b in zip(groups, _numbered(state.groups), strict=True))
                self._progress.say(f"round {state.round + 1}: {moved} of {len(groups)} people changed")
                state.round, state.groups, state.trainings = state.round + 1, groups, []
                self._save(state)
            trainings = self._refine(session, state, self._rows, _LAST_STEPS)
        numbered = _numbered(state.groups)
        for k, training in enumerate(trainings):
            found = training.comparison
            self._progress.say(
                f"{numbered.count(k)} people: {found.gain:.4f} ± {found.error:.4f} nats a token better than "
                f"with the plain seed{'' if found.is_better else '; left out'}"
            )
        better = [
            (training.best, numbered.count(k))
            for k, training in enumerate(trainings)
            if training.best is not None and training.comparison.is_better
        ]
        return Communities(tuple(seed for seed, _ in better), tuple(size for _, size in better))

    # -- steps ---------------------------------------------------------------------------------

    def _cluster(self, session: UpdateSession) -> list[int]:
        gradients = []
        for rows in self._rows:
            (found,) = self._engine.gradients([GradientRequest(session, rows, self._artefact.seed)])
            gradients.append(found.tensors)
            self._advance(len(rows), "clustering people")
        return cluster(gradients, self._count, least=LEAST_PEOPLE, seed=self._seed)

    def _refine(
        self, session: UpdateSession, state: _State, own: Sequence[Sequence[int]], least: int
    ) -> list[Training[Schedule]]:
        """A seed for each group, from the plain one, on these rows of its people."""
        train_rows, judge_rows = _rows_by_group(_numbered(state.groups), own)
        rows = [[*ours, *theirs] for ours, theirs in zip(train_rows, judge_rows, strict=True)]
        trainings = state.trainings
        if not trainings:
            trainings = [
                Training.start(self._schedule(len(ours), len(theirs), least), self._artefact.seed)
                for ours, theirs in zip(train_rows, judge_rows, strict=True)
            ]

        def asked(requests: Sequence[Request]) -> list[GradientRequest]:
            return [GradientRequest(session, [rows[k][i] for i in which], t) for k, which, t in requests]

        def gradients(requests: Sequence[Request]) -> Callable[[], list[tuple[float, ShiftTensors]]]:
            return lambda: [(g.loss, g.tensors) for g in self._engine.gradients(asked(requests))]

        def losses(requests: Sequence[Request]) -> Callable[[], list[list[Score]]]:
            return lambda: self._engine.scores(asked(requests))

        for stepped in train(trainings, gradients=gradients, losses=losses):
            state.trainings = trainings
            examples = sum(trainings[k].schedule.work_of(trainings[k].step - 1) for k in stepped)
            steps = max(training.step for training in trainings)
            self._advance(examples, f"refining {len(rows)} seeds: step {steps}", state)
        return trainings

    def _schedule(self, examples: int, held_out: int, least: int) -> Schedule:
        size = min(self._artefact.batch_size, examples)
        epochs = math.ceil(least / math.ceil(examples / size))
        return Schedule(epochs, self._rate, size, self._seed, examples, held_out=held_out)

    def _assign(self, session: UpdateSession, seeds: Sequence[ShiftTensors]) -> list[int]:
        costs = []
        for rows in map(_newer, self._rows):
            found = self._engine.scores([GradientRequest(session, rows, seed) for seed in seeds])
            costs.append([mean_loss(scores) for scores in found])
            self._advance(0.4 * len(rows) * len(seeds), "giving people a seed")
        return assign(np.array(costs), least=LEAST_PEOPLE)

    # -- keeping -------------------------------------------------------------------------------

    def _advance(self, units: float, text: str, state: _State | None = None) -> None:
        self._progress.advance(units, text)
        stopped = self._stop()
        if state is not None and (stopped or time.monotonic() - self._saved >= _SAVE_SECONDS):
            self._save(state)
        if stopped:
            raise Cancelled("stopped among the communities; the same command goes on from there")

    def _save(self, state: _State) -> None:
        header = {"arguments": self._arguments, "round": state.round, "groups": state.groups}
        parts = [json.dumps(header).encode(), *(training.to_bytes() for training in state.trainings)]
        write_whole(
            self._path, b"".join(item for part in parts for item in (len(part).to_bytes(8, "big"), part))
        )
        self._saved = time.monotonic()

    def _resumed(self) -> _State:
        """What an interrupted run left. Raises InvalidInput, InvalidData."""
        if not self._path.is_file():
            return _State()
        data, parts, at = self._path.read_bytes(), [], 0
        try:
            while at < len(data):
                end = at + 8 + int.from_bytes(data[at : at + 8], "big")
                parts.append(data[at + 8 : end])
                at = end
            header: dict[str, Any] = json.loads(parts[0])
            arguments, groups = header["arguments"], list(map(int, header["groups"]))
            trainings = [Training.from_bytes(part, Schedule) for part in parts[1:]]
            state = _State(int(header["round"]), groups, trainings)
        except (InvalidData, ValueError, KeyError, TypeError, IndexError) as error:
            raise InvalidData(f"{self._path} is damaged; remove it to start anew") from error
        if arguments != self._arguments:
            raise InvalidInput(
                f"{self._path} is of an unfinished run with other arguments or data; repeat its own command, "
                "or remove it to start anew"
            )
        return state

    def _digest(self) -> str:
        """What a resumed run must share with the one it goes on from."""
        words = [self._artefact.version, self._rate, self._artefact.batch_size, self._count, self._seed]
        return hashlib.sha256(json.dumps([words, self._people]).encode()).hexdigest()


def _rows_by_group(
    groups: Sequence[int], own: Sequence[Sequence[int]]
) -> tuple[list[list[int]], list[list[int]]]:
    """Of each group: the rows of those who train its seed, and of those who judge it."""
    count = max(groups) + 1
    train_rows: list[list[int]] = [[] for _ in range(count)]
    judge_rows: list[list[int]] = [[] for _ in range(count)]
    seen = [0] * count
    for group, rows in zip(groups, own, strict=True):
        seen[group] += 1
        (judge_rows if seen[group] % _JUDGE == 0 else train_rows)[group].extend(rows)
    return train_rows, judge_rows


def _numbered(groups: Sequence[int]) -> list[int]:
    """The same groups, counted from 0 without gaps."""
    names = sorted(set(groups))
    return [names.index(group) for group in groups]


def _older(rows: range) -> range:
    return rows[: max(1, len(rows) // 2)]


def _newer(rows: range) -> range:
    return rows[len(rows) // 2 :]
