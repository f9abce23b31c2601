"""Stage 2 (PerFit, Algorithm 1) for many users at once, in this process.

Every user takes the steps of `perfit_shared.training`, by the paper's schedule or a device's; the
gradients come from the engine that serves devices. Users train in *cohorts*: one step of each member
is one pass. Who is in a cohort is a function of the users alone, and an interrupted cohort goes on
from one file with everybody in it, so that the passes, and with them the tensors, are those of an
undisturbed run.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from perfit_cloud.engine.gradients.session import GradientRequest, UpdateEngine
from perfit_cloud.lamp.people import Learner
from perfit_cloud.lamp.results import write_bytes
from perfit_cloud.model.artefacts import Artefact
from perfit_shared.errors import InvalidData, UpdateFailed
from perfit_shared.training import PaperSchedule, Schedule, Training

__all__ = ["Stage2Settings", "train"]

_CHECKPOINT_SECONDS = 30.0


@dataclass(frozen=True)
class Stage2Settings:
    epochs: int
    learning_rate: float  # peak
    batch_size: int  # examples a step
    seed: int
    schedule: str = "device"  # or "paper"

    def schedule_for(self, lengths: Sequence[int]) -> Schedule:
        """`lengths`: of the examples of a history, tokens."""
        examples = len(lengths)
        device = Schedule(
            epochs=self.epochs,
            learning_rate=self.learning_rate,
            seed=self.seed,
            batch_size=min(self.batch_size, examples),
            examples=examples,
        )
        return PaperSchedule(**asdict(device), lengths=tuple(lengths)) if self.schedule == "paper" else device


def train(
    engine: UpdateEngine,
    people: Sequence[Learner],
    artefact: Artefact,
    settings: Stage2Settings,
    *,
    checkpoint: Path,
    resumed: Callable[[int], None],
    progress: Callable[[int, int], None],
    stop: Callable[[], None],
) -> list[Training[Schedule]]:
    """The finished trainings of one cohort, in its order; everybody has a history.

    `resumed` is told how many examples an interrupted run took already, `progress` those of every step
    and how many users are through. `stop` is asked after each step and may raise, with the cohort saved
    in `checkpoint` (removed by the caller once the results are kept). Raises UpdateFailed naming the
    user whose loss is no longer a number.
    """
    trainings = _resumed(checkpoint, people, settings) or [
        Training.start(settings.schedule_for(person.lengths), artefact.seed) for person in people
    ]
    resumed(sum(len(t.schedule.batch(step)) for t in trainings for step in range(t.step)))
    last_saved = clocked = time.monotonic()
    with ExitStack() as open_ones:
        adaptations = {
            i: open_ones.enter_context(engine.open(person.history, artefact))
            for i, person in enumerate(people)
            if not trainings[i].done
        }
        while active := [i for i, t in enumerate(trainings) if not t.done]:
            steps = [GradientRequest(adaptations[i], trainings[i].rows, trainings[i].tensors) for i in active]
            gradients = engine.gradients(steps)
            now = time.monotonic()
            for i, gradient in zip(active, gradients, strict=True):
                try:
                    trainings[i] = trainings[i].stepped(
                        gradient.loss, gradient.tensors, seconds=(now - clocked) / len(active)
                    )
                except UpdateFailed as error:
                    raise UpdateFailed(f"user {people[i].user_id}: {error}") from error
            clocked = now
            progress(sum(len(step.rows) for step in steps), sum(t.done for t in trainings))
            try:
                stop()
            except BaseException:
                _save(checkpoint, people, trainings)
                raise
            if now - last_saved >= _CHECKPOINT_SECONDS:
                _save(checkpoint, people, trainings)
                last_saved = now
    return trainings


def _save(path: Path, people: Sequence[Learner], trainings: Sequence[Training[Schedule]]) -> None:
    """Whole or not at all."""
    states = [training.to_bytes() for training in trainings]
    header = json.dumps(
        {
            "users": [person.user_id for person in people],
            "sizes": [len(state) for state in states],
        }
    ).encode()
    write_bytes(path, len(header).to_bytes(8, "big") + header + b"".join(states))


def _resumed(
    path: Path, people: Sequence[Learner], settings: Stage2Settings
) -> list[Training[Schedule]] | None:
    """What an interrupted run of this cohort left, None when it left nothing. Raises InvalidData."""
    if not path.is_file():
        return None
    planned = [settings.schedule_for(person.lengths) for person in people]
    data = path.read_bytes()
    try:
        start = 8 + int.from_bytes(data[:8], "big")
        header: dict[str, Any] = json.loads(data[8:start])
        if header["users"] != [person.user_id for person in people]:
            return None  # of a cohort whose results are kept by now
        trainings: list[Training[Schedule]] = []
        for size, schedule in zip(header["sizes"], planned, strict=True):
            trainings.append(Training.from_bytes(data[start : start + size], type(schedule)))
            start += size
    except (InvalidData, ValueError, KeyError, TypeError) as error:
        raise InvalidData(f"{path} is damaged; remove it and run again") from error
    return trainings if [t.schedule for t in trainings] == planned else None
