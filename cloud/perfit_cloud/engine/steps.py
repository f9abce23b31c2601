"""Steps of different users that wait at the same moment, run as one pass."""

from __future__ import annotations

from collections.abc import Sequence

from perfit_cloud.engine.adaptation import Adaptation, AdaptationEngine, Step
from perfit_cloud.engine.gradients import Pair
from perfit_cloud.engine.types import Gradient
from perfit_cloud.model.artefacts import Artefact

__all__ = ["StepQueue"]


class StepQueue:
    def __init__(self, engine: AdaptationEngine) -> None:
        self._engine = engine

    def open(self, examples: Sequence[Pair], artefact: Artefact) -> Adaptation:
        return self._engine.open(examples, artefact)

    def gradient(self, step: Step) -> Gradient:
        return self._engine.gradients([step])[0]

    def loss(self, step: Step) -> tuple[float, int]:
        return self._engine.losses([step])[0]

    def close(self) -> None:
        self._engine.close()
