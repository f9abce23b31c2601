"""Stage 2 (PerFit, Algorithm 1) for many users at once, in this process.

Every user takes the steps of `perfit_shared.training`, by the paper's schedule or a device's. Users
train in *cohorts*: one step of each member is one pass. Who is in a cohort is a function of the users
alone, and an interrupted cohort goes on from one file with everybody in it, so that the passes, and
with them the tensors, are those of an undisturbed run.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perfit_cloud.collective.personal import scores_by_start, train_people
from perfit_cloud.engine.gradients.session import UpdateEngine
from perfit_cloud.lamp.people import Learner, Person
from perfit_cloud.lamp.results import write_bytes
from perfit_cloud.model.artefacts import Artefact
from perfit_shared.errors import Diverged, InvalidData, UpdateFailed
from perfit_shared.shifts import ShiftTensors
from perfit_shared.splits import LEAST_HISTORY, SMALLEST_PART, split_sizes
from perfit_shared.starts import CHOOSING, LEAST_TO_CHOOSE, choose_start
from perfit_shared.training import Overrides, Schedule, Training, schedule_for

__all__ = ["Stage2Settings", "train"]

_CHECKPOINT_SECONDS = 30.0


@dataclass(frozen=True)
class Stage2Settings:
    """The schedule, and the figures that it starts from.

    By the "paper" schedule a user trains on the whole history, and the last step's tensors are taken. By
    the "device" one a user trains as on a device: the latest part of the history judges the epochs, or
    all of a short one in folds, and where no epoch is better the start stays.
    """

    epochs: int
    learning_rate: float  # peak
    batch_size: int  # examples a step
    seed: int
    schedule: str = "paper"  # or "device"
    asked_epochs: int | None = None  # the user's own figures
    asked_batch_size: int | None = None

    @property
    def on_device(self) -> bool:
        return self.schedule == Schedule.name

    def trains(self, person: Person | Learner) -> bool:
        """Whether the history is long enough."""
        least = LEAST_HISTORY - SMALLEST_PART if self.on_device else 1
        return len(person.history) >= least

    def schedule_for(self, person: Learner) -> Schedule:
        """The schedule of a person who trains."""
        lengths, held_out = person.lengths, 0
        if self.on_device:  # the queries are the test part
            train, held_out, _ = split_sizes(len(lengths), test_apart=True)
            lengths = lengths[:train]
        overrides = Overrides(self.asked_epochs, self.asked_batch_size, seed=self.seed)
        return schedule_for(self.schedule, self, len(lengths), overrides, held_out=held_out, lengths=lengths)

    def start_of(self, engine: UpdateEngine, person: Learner, artefact: Artefact) -> ShiftTensors:
        """Where a person starts: on a "device" schedule at the start that a device would choose."""
        if not (self.on_device and artefact.communities) or len(person.history) < LEAST_TO_CHOOSE:
            return artefact.seed
        return artefact.starts[choose_start(scores_by_start(engine, artefact, person.history[-CHOOSING:]))]


def train(
    engine: UpdateEngine,
    people: Sequence[Learner],
    artefact: Artefact,
    settings: Stage2Settings,
    *,
    starts: Sequence[ShiftTensors] | None = None,
    checkpoint: Path,
    resumed: Callable[[int], None],
    progress: Callable[[int, int], None],
    stop: Callable[[], None],
) -> list[Training[Schedule]]:
    """The finished trainings of one cohort, in its order; everybody has a history.

    `starts`: of each person; None: the seed.
    `resumed` gets how many examples an interrupted run took already, `progress` those of every step and
    how many users are done. `stop` runs after each step and may raise, with the cohort saved in
    `checkpoint` (the caller removes it once the results are saved). Raises UpdateFailed naming the
    user whose loss is no longer a number.
    """
    starts = starts or [artefact.seed] * len(people)
    trainings = _resumed(checkpoint, people, settings) or [
        Training.start(settings.schedule_for(person), start)
        for person, start in zip(people, starts, strict=True)
    ]
    resumed(sum(t.schedule.work_of(step) for t in trainings for step in range(t.step)))
    last_saved = time.monotonic()
    try:
        for stepped in train_people(engine, artefact, [person.history for person in people], trainings):
            latest = [trainings[i].schedule.work_of(trainings[i].step - 1) for i in stepped]
            progress(sum(latest), sum(t.done for t in trainings))
            try:
                stop()
            except BaseException:
                _save(checkpoint, people, trainings)
                raise
            if time.monotonic() - last_saved >= _CHECKPOINT_SECONDS:
                _save(checkpoint, people, trainings)
                last_saved = time.monotonic()
    except Diverged as error:
        raise UpdateFailed(f"user {people[error.index].user_id}: {error}") from error
    return trainings


def _save(path: Path, people: Sequence[Learner], trainings: Sequence[Training[Schedule]]) -> None:
    """Whole or not at all."""
    states = [training.to_bytes() for training in trainings]
    header = json.dumps(
        {"users": [person.user_id for person in people], "sizes": [len(state) for state in states]}
    ).encode()
    write_bytes(path, len(header).to_bytes(8, "big") + header + b"".join(states))


def _resumed(
    path: Path, people: Sequence[Learner], settings: Stage2Settings
) -> list[Training[Schedule]] | None:
    """What an interrupted run of this cohort left, None when it left nothing. Raises InvalidData."""
    if not path.is_file():
        return None
    planned = [settings.schedule_for(person) for person in people]
    data = path.read_bytes()
    try:
        start = 8 + int.from_bytes(data[:8], "big")
        header: dict[str, Any] = json.loads(data[8:start])
        if header["users"] != [person.user_id for person in people]:
            return None  # of a cohort whose results are saved by now
        trainings: list[Training[Schedule]] = []
        for size, schedule in zip(header["sizes"], planned, strict=True):
            trainings.append(Training.from_bytes(data[start : start + size], type(schedule)))
            start += size
    except (InvalidData, ValueError, KeyError, TypeError) as error:
        raise InvalidData(f"{path} is damaged; remove it and run again") from error
    return trainings if [t.schedule for t in trainings] == planned else None
