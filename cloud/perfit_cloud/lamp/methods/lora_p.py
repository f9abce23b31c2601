"""LoRA-P: everybody's own LoRA on q and v, from nothing; nothing is shared."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from perfit_cloud.lamp.methods.adapters import AdapterMethod
from perfit_cloud.lamp.methods.added_weights import Weights
from perfit_cloud.lamp.methods.lora import PERSONAL, add_lora

__all__ = ["LoraP"]


class LoraP(AdapterMethod):
    name = "lora-p"

    def prepare(self, stop: Callable[[], bool]) -> float:
        (self.added,) = add_lora(self.data.base, [PERSONAL], seed=self.request.seed)
        return self.choose_rate(stop)

    @property
    def shared(self) -> Mapping[str, Weights | None]:
        return {"base": None}
