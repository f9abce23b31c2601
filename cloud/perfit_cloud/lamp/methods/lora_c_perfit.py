"""LoRA-C, then everybody's own shift (PerFit, Table 12): stage 2 on a model with the collective LoRA.

The LoRA lies on q, k and v of all blocks, or of those that PerFit intervenes on. It is frozen while a
shift is learned, at the same blocks and positions as PerFit's and from the identity.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from perfit_cloud.collective.spec import spec_of
from perfit_cloud.engine.interface import ShiftUse
from perfit_cloud.lamp.methods.adapters import in_groups
from perfit_cloud.lamp.methods.added_weights import AddedWeights
from perfit_cloud.lamp.methods.interface import Done, QueryRequest, TaskData
from perfit_cloud.lamp.methods.lora import COLLECTIVE, add_lora
from perfit_cloud.lamp.methods.lora_collective import (
    COLLECTIVE_OPTIONS,
    check_collective,
    collective_settings,
    load_or_train,
)
from perfit_cloud.lamp.methods.perfit import PersonalOnly
from perfit_shared.errors import InvalidInput
from perfit_shared.presets import preset_for, preset_name
from perfit_shared.types import Mode, Score

if TYPE_CHECKING:
    from perfit_cloud.lamp.request import LampRequest

__all__ = ["LORA_LAYERS", "LoraCPerFit"]

LORA_LAYERS = ("all", "perfit")


class LoraCPerFit(PersonalOnly):
    name = "lora-c+perfit"
    shared_modes: ClassVar[tuple[str, ...]] = ("base", "collective")
    options = (PersonalOnly.options - {"collective_rank"}) | COLLECTIVE_OPTIONS | {"lora_layers"}
    collective: AddedWeights  # from `prepare` on

    def __init__(self, request: LampRequest, data: TaskData) -> None:
        super().__init__(request, data)
        self._untouched = PersonalOnly(request, data)  # never prepared: it answers with the base model

    @classmethod
    def check(cls, request: LampRequest) -> None:
        check_collective(request)
        if request.lora_layers not in LORA_LAYERS:
            raise InvalidInput(f"lora layers should be {' or '.join(LORA_LAYERS)}")

    def prepare(self, stop: Callable[[], bool]) -> float:
        request, plain = self.request, self._untouched.data
        layers = None
        if request.lora_layers == "perfit":
            preset = preset_for(preset_name(plain.task.name, request.preset))
            layers = spec_of(request, preset, plain.base).layers
        (self.collective,) = add_lora(plain.base, [replace(COLLECTIVE, layers=layers)], seed=request.seed)
        seconds = load_or_train(request, plain, self.collective, stop)
        self.data = replace(plain, base=self.collective.base)
        return seconds + super().prepare(stop)

    @property
    def rate_depends(self) -> Mapping[str, Any]:
        return {**super().rate_depends, "lora": self.collective.version}

    @property
    def shared(self) -> Mapping[str, ShiftUse]:
        return {"base": ShiftUse(Mode.BASE), "collective": ShiftUse(Mode.COLLECTIVE, self.artefact)}

    @property
    def settings(self) -> Mapping[str, Any]:
        own = {"lora_layers": self.request.lora_layers}
        return {**super().settings, **collective_settings(self.request, self.collective), **own}

    # -- answers: those of the untouched model come from a tree without the LoRA -------------------

    def answer(self, requests: Sequence[QueryRequest[ShiftUse]], done: Done) -> list[str]:
        adapted = super().answer

        def of_part(part: Sequence[QueryRequest[ShiftUse]]) -> list[str]:
            return (self._untouched.answer if _is_base(part[0]) else adapted)(part, done)

        return in_groups(requests, _is_base, of_part)

    def score(
        self, requests: Sequence[QueryRequest[ShiftUse]], answers: Sequence[str] | None = None
    ) -> list[Score]:
        adapted = super().score

        def of_part(part: Sequence[int]) -> list[Score]:
            score = self._untouched.score if _is_base(requests[part[0]]) else adapted
            return score([requests[i] for i in part], None if answers is None else [answers[i] for i in part])

        return in_groups(range(len(requests)), lambda i: _is_base(requests[i]), of_part)

    def close(self) -> None:
        super().close()
        self._untouched.close()


def _is_base(request: QueryRequest[ShiftUse]) -> bool:
    return request.state.mode is Mode.BASE
