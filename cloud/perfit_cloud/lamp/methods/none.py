"""The untouched model: nobody has a state."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from perfit_cloud.lamp.methods.frozen import FrozenMethod
from perfit_cloud.lamp.methods.interface import FitContext, Fitted
from perfit_cloud.lamp.people import Person
from perfit_shared.errors import InvalidData

__all__ = ["Untouched"]


class Untouched(FrozenMethod[None]):
    name = "none"
    learns = False
    parameters = 0

    @property
    def settings(self) -> Mapping[str, Any]:
        return {}

    def prepare(self, stop: Callable[[], bool]) -> float:
        return 0.0

    @property
    def start(self) -> None:
        return None

    @property
    def shared(self) -> Mapping[str, None]:
        return {"base": None}

    def fit(self, person: Person, context: FitContext) -> Fitted[None]:
        return Fitted(None)

    def to_bytes(self, state: None) -> bytes:
        return b""

    def from_bytes(self, data: bytes) -> None:
        if data:
            raise InvalidData("the untouched model has no states")
