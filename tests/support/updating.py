"""Updates of devices against a server of this process, and schedulers that tests can watch and break."""

from __future__ import annotations

import threading
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from perfit_cloud.engine.gradients.scheduler import GradientScheduler
from perfit_cloud.engine.gradients.session import UpdateEngine, UpdateSession
from perfit_device import history, personal
from perfit_device.cloud.client import Cloud
from perfit_device.cloud.codec import Artefact, CloudInfo
from perfit_device.cloud.identity import Enrolment, Identity
from perfit_device.cloud.retry import RetryPolicy
from perfit_device.evaluation import Before, nothing_before
from perfit_device.history import HistoryItem, Split
from perfit_device.training.gradients import GradientSource
from perfit_device.training.update import Plan, Source, Update, UpdateSettings
from perfit_device.vault.crypto import KdfParams
from perfit_device.vault.store import Vault
from perfit_shared.errors import PerfitError
from perfit_shared.shifts import ShiftTensors
from perfit_shared.validation import mean_loss
from tests.support.cloud import Running

WORDS = ["cat", "dog", "mat", "door", "sat", "ran"]
KEEP = 2**26


class Watched(GradientScheduler):
    """A queue that counts the steps of streams, and whose n-th step fails as a test says."""

    def __init__(self, engine: UpdateEngine) -> None:
        super().__init__(engine)
        self.opened = self.asked = 0
        self.fail: dict[int, PerfitError] = {}  # by number of the step
        self.hold = threading.Event()
        self.hold.set()

    def open(self, *args: Any, **how: Any) -> Any:
        self.opened += 1
        return super().open(*args, **how)

    def submit(self, step: Any, **how: Any) -> Any:
        if not isinstance(step.session, UpdateSession):
            return super().submit(step, **how)
        self.asked += 1
        self.hold.wait(20)
        if self.asked in self.fail:
            raise self.fail[self.asked]
        return super().submit(step, **how)


@dataclass
class Parts:
    """A cloud, a device that is enrolled there, and its history."""

    running: Running
    engine: UpdateEngine
    queue: Watched
    cloud: Cloud
    info: CloudInfo
    split: Split
    folder: Path
    streams: list[str] = field(default_factory=list)  # methods of the streams that were opened

    @property
    def artefact(self) -> Artefact:
        return self.info.artefacts[0]

    def adapting(self, before: Before = nothing_before, **limits: int) -> GradientSource:
        limits_then = replace(self.info.limits, **limits)
        return GradientSource(self.cloud, self.artefact, limits_then, self.split, before)

    def gate_loss(self, source: GradientSource, tensors: ShiftTensors) -> float:
        """Nats a token."""
        first = len(self.split.train)
        return mean_loss(source.scores(range(first, first + len(self.split.gate)), tensors)())

    def update(self, source: GradientSource, name: str, *, folds: int = 0) -> ShiftTensors:
        """The final tensors of an update of 3 epochs and 12 steps."""
        train, gate = len(self.split.train), len(self.split.gate)
        plan = Plan(
            epochs=3,
            learning_rate=1e-2,
            batch_size=5,
            seed=0,
            fresh=False,
            history=self.split.digest(),
            version=self.artefact.version,
            examples=train + gate if folds else train,
            held_out=0 if folds else gate,
            folds=folds,
        )
        with Vault.create(self.folder / name, "x", kdf=KdfParams(32, 1, 4)) as vault:
            result = Update(
                lambda: nullcontext(vault),
                self.info.cloud_id,
                self.artefact,
                plan,
                start=self.cloud.fetch_seed(self.artefact),
                source=Source(source.gradient, source.scores),
                settings=UpdateSettings(retry_policy=RetryPolicy(give_up=5.0, sleep=lambda _: None)),
            ).run()
            assert result.steps == 12 and result.gate.accepted
            shift = personal.load(vault, self.info.cloud_id, self.artefact)
            assert shift is not None
            return shift.tensors


def split_of(artefact: Any) -> Split:
    """24 examples of one person."""
    rng = np.random.default_rng(0)
    return history.split(
        [
            HistoryItem.make(
                artefact.task,
                {"text": " ".join(rng.choice(WORDS, 5)), "title": f"a {rng.choice(WORDS)}"},
                date=f"2024-01-{n + 1:02}",
            )
            for n in range(24)
        ]
    )


def enrolled(running: Running) -> Enrolment:
    """As after `perfit enroll`."""
    identity = Identity.create()
    return Enrolment(
        identity=identity,
        certificate=running.authority.enroll(running.invite(), identity.csr()),
        server_ca=running.authority.server_ca_der,
        address=running.address,
        enrolment_address=running.server.addresses.enrol_address,
        cloud_id=running.authority.cloud_id,
    )


def assert_near(got: ShiftTensors, wanted: ShiftTensors, start: ShiftTensors) -> None:
    moved = 0.0
    for (_, a), (_, b), (_, seed) in zip(got.named(), wanted.named(), start.named(), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-4)
        moved += float(np.abs(b - seed).max())
    assert moved > 0.02, "or two updates that learn nothing would agree too"
