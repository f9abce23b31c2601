"""LoRA-C: one LoRA on q, k and v for everybody, and nobody has weights of their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from perfit_cloud.lamp.methods.adapters import AdapterMethod
from perfit_cloud.lamp.methods.added_weights import Weights
from perfit_cloud.lamp.methods.lora import COLLECTIVE, add_lora
from perfit_cloud.lamp.methods.lora_collective import (
    COLLECTIVE_OPTIONS,
    check_collective,
    collective_settings,
    load_or_train,
)

if TYPE_CHECKING:
    from perfit_cloud.lamp.request import LampRequest

__all__ = ["LoraC"]


class LoraC(AdapterMethod):
    name = "lora-c"
    shared_modes: ClassVar[tuple[str, ...]] = ("base", "collective")
    options = COLLECTIVE_OPTIONS
    learns = False

    @classmethod
    def check(cls, request: LampRequest) -> None:
        check_collective(request)

    def prepare(self, stop: Callable[[], bool]) -> float:
        (self.added,) = add_lora(self.data.base, [COLLECTIVE], seed=self.request.seed)
        return load_or_train(self.request, self.data, self.added, stop)

    @property
    def parameters(self) -> int:
        return 0

    @property
    def settings(self) -> Mapping[str, Any]:
        return collective_settings(self.request, self.added)

    @property
    def shared(self) -> Mapping[str, Weights | None]:
        return {"base": None, "collective": self.start}
