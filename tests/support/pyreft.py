"""Shifts as pyreft checkpoints, and checkpoints compared."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from perfit_cloud.model.pyreft import write_checkpoint
from perfit_shared.shifts import ShiftSpec, ShiftTensors
from tests.support.models import random_shift

SPEC = ShiftSpec((1, 2), "f3+l3", collective_rank=6, personal_rank=3, hidden_size=32)
FIRST = "intkey_layer_1_comp_block_output_unit_pos_nunit_1#0.bin"
SECOND = "intkey_layer_2_comp_block_output_unit_pos_nunit_1#1.bin"
Shifts = tuple[ShiftTensors, ShiftTensors]


def random_shifts() -> Shifts:
    """φ₁ and φ₂."""
    return random_shift(SPEC, 6, seed=1), random_shift(SPEC, 3, seed=2)


def written(folder: Path) -> Path:
    """A checkpoint with φ₁ and φ₂."""
    folder.mkdir()
    write_checkpoint(folder, random_shifts())
    return folder


def states(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    return {path.name: torch.load(path, weights_only=True) for path in sorted(folder.glob("*.bin"))}


def same_states(a: Path, b: Path) -> bool:
    first, second = states(a), states(b)
    return first.keys() == second.keys() and all(
        first[name].keys() == second[name].keys()
        and all(torch.equal(first[name][key], second[name][key]) for key in first[name])
        and all(first[name][key].dtype == second[name][key].dtype for key in first[name])
        for name in first
    )


def change_state(folder: Path, name: str, change: Callable[[dict[str, Any]], object]) -> None:
    state = torch.load(folder / name, weights_only=True)
    change(state)
    torch.save(state, folder / name)
