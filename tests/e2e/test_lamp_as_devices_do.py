"""Stage 2 of the research pipeline and a device's update over gRPC take the same steps.

What these steps are is written out here as numbers, so that neither side is measured by the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support.processes import ForkedCloud

from perfit_cloud.engine.gradients.session import UpdateEngine
from perfit_cloud.lamp import stage2
from perfit_cloud.lamp.people import Learner
from perfit_cloud.model.artefacts import Artefact
from perfit_cloud.model.base import BaseModel
from perfit_device import history, personal
from perfit_device.cloud import enrolment
from perfit_device.cloud.client import Cloud
from perfit_device.cloud.identity import Identity
from perfit_device.history import HistoryItem
from perfit_device.training import update as updates
from perfit_device.training.gradients import GradientSource
from perfit_device.vault.crypto import KdfParams
from perfit_device.vault.store import Vault
from perfit_shared.invites import Invite
from perfit_shared.shifts import ShiftTensors
from perfit_shared.training import schedule_for

WORDS = ["cat", "dog", "mat", "door", "sat", "ran"]
# The artefact says 3 epochs of 16 examples a batch. Histories of 15 or 9 are judged in three folds, and so
# short ones take batches of 4 and at least 75 steps: the training's own, and those of each fold.
STEPS = {15: 76, 9: 75}
ONE_EPOCH = {
    15: [
        [[2, 11, 3, 10], [11, 10], [2, 11], [2, 3]],
        [[0, 4, 7, 5], [7, 5, 14], [3, 10, 0], [0, 4, 7]],
        [[14, 12, 6, 9], [12, 6], [4, 14], [5, 6]],
        [[13, 8, 1], [9, 13, 8], [12, 13, 1], [9, 8, 1]],
    ],
    9: [
        [[4, 5, 2, 6], [4, 5], [2, 6], [4, 5]],
        [[3, 8, 7, 0], [6, 3], [8, 7], [2, 3]],
        [[1], [8, 7], [0, 1], [0, 1]],
    ],
}
PEAK = 0.005
FIRST_RATE = PEAK / 10  # it grows tenfold


@dataclass
class Steps:
    """What one side asked gradients for, and what came of it."""

    rows: list[list[int]]
    tensors: list[ShiftTensors]  # before each step
    outcome: ShiftTensors | None = None

    def note(self, rows: Sequence[int], tensors: ShiftTensors) -> None:
        self.rows.append(list(rows))
        self.tensors.append(tensors)


def on_a_device(cloud: Cloud, items: list[HistoryItem], folder: Path) -> Steps:
    """What `perfit update` does, from a vault with nothing in it."""
    info = cloud.describe()
    (artefact,) = info.artefacts
    queries = [HistoryItem.make(artefact.task, {"text": "a door", "title": "held out"}, part="test")]
    split = history.split([*items, *queries])
    schedule = schedule_for("device", artefact, len(split.train), held_out=len(split.gate))
    plan = updates.Plan(**asdict(schedule), fresh=False, history=split.digest(), version=artefact.version)
    steps = Steps([], [])
    with (
        Vault.create(folder / "vault.db", "x", kdf=KdfParams(32, 1, 4)) as vault,
        GradientSource(cloud, artefact, info.limits, split) as source,
    ):

        def gradient(rows: Sequence[int], tensors: ShiftTensors) -> Any:
            steps.note(rows, tensors)
            return source.gradient(rows, tensors)

        run = updates.Update(
            lambda: nullcontext(vault),
            info.cloud_id,
            artefact,
            plan,
            start=cloud.fetch_seed(artefact),
            source=updates.Source(gradient, source.scores),
        )
        assert run.run().gate.accepted
        shift = personal.load(vault, info.cloud_id, artefact)
    assert shift is not None
    steps.outcome = shift.tensors
    return steps


class NotingEngine(UpdateEngine):
    """Notes the steps, by the length of the history."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.steps: dict[int, Steps] = {}

    def gradients(self, steps: Any) -> Any:
        for step in steps:
            noted = self.steps.setdefault(step.session.examples, Steps([], []))
            noted.note(step.rows, step.personal)
        return super().gradients(steps)


def in_the_pipeline(base: BaseModel, artefact: Artefact, people: list[Learner], folder: Path) -> list[Steps]:
    engine = NotingEngine(base, keep_bytes=1 << 30)
    settings = stage2.Stage2Settings(
        artefact.epochs, artefact.learning_rate, artefact.batch_size, seed=0, schedule="device"
    )
    trainings = stage2.train(
        engine,
        people,
        artefact,
        settings,
        checkpoint=folder / "c.bin",
        resumed=lambda examples: None,
        progress=lambda examples, finished: None,
        stop=lambda: None,
    )
    engine.close()
    for person, training in zip(people, trainings, strict=True):
        engine.steps[len(person.history)].outcome = training.outcome(artefact.seed)
    return [engine.steps[len(person.history)] for person in people]


@pytest.mark.slow
def test_the_same_steps_as_devices_over_grpc(
    model_folder: Callable[[str], Path],
    load: Callable[[str], BaseModel],
    make_artefact: Callable[..., Artefact],
    tmp_path: Path,
) -> None:
    base = load("llama")
    artefact = replace(make_artefact(base), epochs=3, batch_size=16, learning_rate=PEAK)
    artefact.save(tmp_path / "artefact")
    rng = np.random.default_rng(0)
    histories = [
        [
            HistoryItem.make(
                artefact.task,
                {"text": " ".join(rng.choice(WORDS, 5)), "title": f"a {word}"},
                date=f"2024-01-{n + 1:02}",
            )
            for n in range(count)
        ]
        for count, word in ((15, "cat"), (9, "mat"))
    ]
    devices = []
    with ForkedCloud(model_folder("llama"), [tmp_path / "artefact"], tmp_path / "cloud") as server:
        for number, items in enumerate(histories):
            invite = Invite.decode(server.invite())
            (folder := tmp_path / f"device{number}").mkdir()
            with Cloud(enrolment.enroll(invite, Identity.create())) as cloud:
                devices.append(on_a_device(cloud, items, folder))

    def person(number: int, items: list[HistoryItem]) -> Learner:
        examples = [artefact.task.example(item.fields) for item in items]
        pairs = [(base.encode(e.prompt), base.encode_target(e.target)) for e in examples]
        return Learner(str(number), tuple(pairs))

    people = [person(n, items) for n, items in enumerate(histories)]
    pipeline = in_the_pipeline(base, artefact, people, tmp_path)
    for items, over_the_wire, here in zip(histories, devices, pipeline, strict=True):
        batches = [rows for step in ONE_EPOCH[len(items)] for rows in step]
        for side in (over_the_wire, here):
            assert side.rows[: len(batches)] == batches
            assert len(side.rows) == 4 * STEPS[len(items)]
            moved = side.tensors[4].layers[1].bias - side.tensors[0].layers[1].bias
            # Adam's first step moves every number by the rate.
            np.testing.assert_allclose(np.abs(moved), FIRST_RATE, rtol=1e-3)
        assert over_the_wire.rows == here.rows
        for step in (0, 4, 5, 7, 120, 4 * 75 - 1):
            assert distance(over_the_wire.tensors[step], here.tensors[step]) < 5e-4  # float16 on the wire
        assert over_the_wire.outcome is not None and here.outcome is not None
        assert distance(over_the_wire.outcome, here.outcome) < 5e-4
        assert distance(here.outcome, artefact.seed) > 0.01, "or two that learn nothing would agree too"


def distance(one: ShiftTensors, two: ShiftTensors) -> float:
    pairs = zip(one.named(), two.named(), strict=True)
    return max(float(np.abs(a - b).max()) for (_, a), (_, b) in pairs)
