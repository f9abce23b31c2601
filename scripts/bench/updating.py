"""Personal updates through the engine that serves Adapt, without the wire."""

from __future__ import annotations

from collections.abc import Sequence
from threading import Event

from workload import Pair

from perfit_cloud.engine.gradients.scheduler import GradientScheduler
from perfit_cloud.engine.gradients.session import GradientRequest
from perfit_cloud.model.artefacts import Artefact
from perfit_shared.training import Schedule, Training

__all__ = ["update"]


def update(
    queue: GradientScheduler,
    artefact: Artefact,
    pairs: Sequence[Pair],
    schedule: Schedule,
    *,
    stop: Event | None = None,
) -> Training[Schedule]:
    """A whole update as a device drives it, the pass that fills the cache included; `stop` cuts it short."""
    training = Training.start(schedule, artefact.seed)
    with queue.open(pairs, artefact) as session:
        while not training.done and not (stop is not None and stop.is_set()):
            found = queue.submit(GradientRequest(session, training.rows, training.tensors)).result()
            training = training.stepped(found.loss, found.tensors)
    return training
