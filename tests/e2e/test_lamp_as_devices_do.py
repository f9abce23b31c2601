"""Stage 2 of the research pipeline and a device's update over gRPC take the same steps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from tests.support.processes import ForkedCloud

from perfit_cloud.engine.gradients.session import UpdateEngine
from perfit_cloud.lamp import stage2
from perfit_cloud.lamp.people import Learner
from perfit_cloud.model.artefacts import Artefact
from perfit_cloud.model.base import BaseModel
from perfit_device.cloud import enrolment
from perfit_device.cloud.client import Cloud
from perfit_device.cloud.identity import Identity
from perfit_device.history import HistoryItem, Split
from perfit_device.training.gradients import Adapting
from perfit_shared.invites import Invite
from perfit_shared.shifts import ShiftTensors
from perfit_shared.training import Schedule, Training

WORDS = ["cat", "dog", "mat", "door", "sat", "ran"]


def over_grpc(cloud: Cloud, items: list[HistoryItem], settings: stage2.Stage2Settings) -> ShiftTensors:
    """What `perfit update` does without its vault and gate."""
    info = cloud.describe()
    (artefact,) = info.artefacts
    schedule = settings.schedule_for([0] * len(items))
    training: Training[Schedule] = Training.start(schedule, cloud.fetch_seed(artefact))
    with Adapting(cloud, artefact, info.limits, Split(items, (), ())) as source:
        while not training.done:
            loss, _, tensors = source.gradient(training.rows, training.tensors)()
            training = training.stepped(loss, tensors)
    return training.tensors


def test_the_same_tensors_as_devices_over_grpc(
    model_folder: Callable[[str], Path],
    load: Callable[[str], BaseModel],
    make_artefact: Callable[..., Artefact],
    tmp_path: Path,
) -> None:
    base = load("llama")
    artefact = make_artefact(base)
    artefact.save(tmp_path / "artefact")
    rng = np.random.default_rng(0)
    histories = [
        [
            HistoryItem.make(artefact.task, {"text": " ".join(rng.choice(WORDS, 5)), "title": f"a {word}"})
            for _ in range(count)
        ]
        for count, word in ((13, "cat"), (6, "dog"), (9, "mat"))
    ]
    settings = stage2.Stage2Settings(epochs=3, learning_rate=1e-2, batch_size=4, seed=0)
    with ForkedCloud(model_folder("llama"), [tmp_path / "artefact"], tmp_path / "cloud") as server:
        remote = []
        for items in histories:
            invite = Invite.decode(server.invite())
            with Cloud(enrolment.enroll(invite, Identity.create())) as cloud:
                remote.append(over_grpc(cloud, items, settings))

    def person(number: int, items: list[HistoryItem]) -> Learner:
        examples = [artefact.task.example(item.fields) for item in items]
        pairs = [(base.encode(e.prompt), base.encode_target(e.target)) for e in examples]
        return Learner(str(number), tuple(pairs))

    engine = UpdateEngine(base, keep_bytes=1 << 30)
    people = [person(n, items) for n, items in enumerate(histories)]
    trainings = stage2.train(
        engine,
        people,
        artefact,
        settings,
        checkpoint=tmp_path / "c.bin",
        resumed=lambda examples: None,
        progress=lambda examples, finished: None,
        stop=lambda: None,
    )
    engine.close()
    for over_the_wire, training in zip(remote, trainings, strict=True):
        moved = 0.0
        for (_, theirs), (_, ours), (_, start) in zip(
            over_the_wire.named(), training.tensors.named(), artefact.seed.named(), strict=True
        ):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=5e-4)  # float16 on the wire
            moved += float(np.abs(ours - start).max())
        assert moved > 0.01, "or two runs that learn nothing would agree too"
