"""Where a request puts its shifts, and how large they are: a preset's row, with what it names itself."""

from __future__ import annotations

from typing import Protocol

from perfit_cloud.model.base import BaseModel
from perfit_shared.presets import Preset
from perfit_shared.shifts import ShiftSpec

__all__ = ["ShiftChoice", "spec_of"]


class ShiftChoice(Protocol):
    """What requests of stage 1, of blank artefacts and of LaMP runs say; None stands for the preset's."""

    @property
    def layers(self) -> tuple[int, ...] | None: ...
    @property
    def positions(self) -> str | None: ...
    @property
    def collective_rank(self) -> int | None: ...
    @property
    def personal_rank(self) -> int | None: ...


def spec_of(choice: ShiftChoice, preset: Preset, base: BaseModel) -> ShiftSpec:
    """The preset's with what was chosen. Raises InvalidInput for what this model has no room for."""
    return preset.spec(
        blocks=base.blocks,
        hidden_size=base.hidden_size,
        layers=choice.layers,
        positions=choice.positions,
        collective_rank=choice.collective_rank,
        personal_rank=choice.personal_rank,
    )
