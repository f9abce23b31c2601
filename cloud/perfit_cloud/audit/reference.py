"""What a server will compute of a request, computed here first.

Nobody receives the answer or gradient of a call that is cut off, and the server never sends token ids and
exact gradients. To search for them the auditor runs the server's engines on the same model: the same request
gives the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

from perfit_cloud.engine.generation.factory import build_engine
from perfit_cloud.engine.gradients.batch import Pair
from perfit_cloud.engine.gradients.session import GradientRequest, UpdateEngine
from perfit_cloud.engine.gradients.stateless import GradientEngine
from perfit_cloud.engine.interface import GenerationSettings, ShiftUse
from perfit_cloud.model.artefacts import Artefact
from perfit_cloud.model.base import BaseModel
from perfit_shared.shifts import ShiftTensors
from perfit_shared.types import Mode, Sampling

__all__ = ["ReferenceEngines"]

_KEEP_BYTES = 2**28


class ReferenceEngines:
    """The engines, for the length of a with block."""

    def __init__(self, base: BaseModel, artefact: Artefact) -> None:
        self.base, self.artefact = base, artefact
        self._generation = build_engine(base, {artefact.name: artefact}, GenerationSettings(), name="own")
        self._gradients = GradientEngine(base)
        self._adaptations = UpdateEngine(base, keep_bytes=_KEEP_BYTES)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._generation.stop()
        self._gradients.close()
        self._adaptations.close()

    def decoded(self, personal: bytes) -> ShiftTensors:
        """The tensors that a server makes of these bytes."""
        spec = self.artefact.spec
        return ShiftTensors.from_bytes(personal, spec, spec.personal_rank)

    def answer(self, prompt: str, personal: ShiftTensors, sampling: Sampling) -> tuple[str, list[int]]:
        """The whole answer's text, and its token ids."""
        answer = self._generation.submit(self.base.encode(prompt), self._use(personal), sampling)
        return "".join(chunk.text for chunk in answer), answer.ids

    def gradient(self, pairs: Sequence[tuple[str, str]], personal: ShiftTensors) -> ShiftTensors:
        """What ComputeGradient finds for (prompt, target) texts."""
        return self._gradients.gradient(self.ids(pairs), self._use(personal)).tensors

    def step(self, pairs: Sequence[tuple[str, str]], personal: ShiftTensors) -> ShiftTensors:
        """What a step of Adapt over all these pairs finds."""
        with self._adaptations.open(self.ids(pairs), self.artefact) as session:
            step = GradientRequest(session, range(len(pairs)), personal)
            return self._adaptations.gradients([step])[0].tensors

    def ids(self, pairs: Sequence[tuple[str, str]]) -> list[Pair]:
        return [(self.base.encode(prompt), self.base.encode_target(target)) for prompt, target in pairs]

    def _use(self, personal: ShiftTensors) -> ShiftUse:
        return ShiftUse(Mode.PERSONAL, self.artefact, personal)
