"""OPPU (Tan et al., 2024): LoRA-C, frozen, and everybody's own LoRA on q and v on top of it.

The collective adapter is not merged into the weights, which would round it to the base model's dtype: both
adapters' changes are added to what the frozen projection gives, which is the same function.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from perfit_cloud.lamp.methods.adapters import PERSONAL_OPTIONS, AdapterMethod
from perfit_cloud.lamp.methods.added_weights import AddedWeights, Weights
from perfit_cloud.lamp.methods.lora import COLLECTIVE, PERSONAL, add_lora
from perfit_cloud.lamp.methods.lora_collective import (
    COLLECTIVE_OPTIONS,
    check_collective,
    collective_settings,
    load_or_train,
)

if TYPE_CHECKING:
    from perfit_cloud.lamp.request import LampRequest

__all__ = ["Oppu"]


class Oppu(AdapterMethod):
    name = "oppu"
    shared_modes: ClassVar[tuple[str, ...]] = ("base", "collective")
    options = COLLECTIVE_OPTIONS | PERSONAL_OPTIONS
    collective: AddedWeights  # from `prepare` on

    @classmethod
    def check(cls, request: LampRequest) -> None:
        check_collective(request)

    def prepare(self, stop: Callable[[], bool]) -> float:
        adapters = [COLLECTIVE, PERSONAL]
        self.collective, self.added = add_lora(self.data.base, adapters, seed=self.request.seed)
        seconds = load_or_train(self.request, self.data, self.collective, stop)
        return seconds + self.choose_rate(stop)

    @property
    def rate_depends(self) -> Mapping[str, Any]:
        return {"lora": self.collective.version}

    @property
    def settings(self) -> Mapping[str, Any]:
        return {**super().settings, **collective_settings(self.request, self.collective)}

    @property
    def shared(self) -> Mapping[str, Weights | None]:
        return {"base": None, "collective": self.start}
