"""The memory by which tensors of shifts reach vLLM's processes, so that no message of vLLM's carries any.

One anonymous file, mapped by all. It begins with the collective shift of each artefact. Behind them lies a
slot for each request in flight, which the engine fills when the request goes to vLLM and overwrites when it
ends.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from perfit_cloud.model.artefacts import Artefact
from perfit_cloud.model.interventions import Phi, Shift

__all__ = ["Layout", "SideChannel"]

_FLOAT = 4  # bytes
_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - a file system in memory, and no name there outlives the start
_Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class _Shape:
    """Of one artefact's shifts."""

    layers: tuple[int, ...]
    collective_rank: int
    personal_rank: int
    hidden: int

    def floats(self, rank: int) -> int:
        """How many numbers R (r, d), W (r, d) and b (r) of all layers are."""
        return len(self.layers) * rank * (2 * self.hidden + 1)


@dataclass(frozen=True)
class Layout:
    """Where what lies in the memory."""

    shapes: tuple[_Shape, ...]  # of each artefact, in the order of its number
    slots: int

    @classmethod
    def of(cls, artefacts: Sequence[Artefact], slots: int) -> Layout:
        specs = [artefact.spec for artefact in artefacts]
        shapes = (_Shape(s.layers, s.collective_rank, s.personal_rank, s.hidden_size) for s in specs)
        return cls(tuple(shapes), slots)

    @property
    def slot_floats(self) -> int:
        return max((shape.floats(shape.personal_rank) for shape in self.shapes), default=0)

    @property
    def bytes(self) -> int:
        shared = sum(shape.floats(shape.collective_rank) for shape in self.shapes)
        return max(1, _FLOAT * (shared + self.slots * self.slot_floats))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, told: Mapping[str, Any]) -> Layout:
        shapes = ({**shape, "layers": tuple(shape["layers"])} for shape in told["shapes"])
        return cls(tuple(_Shape(**shape) for shape in shapes), told["slots"])


class SideChannel:
    """The memory, as one process has it mapped."""

    def __init__(self, layout: Layout, file: int) -> None:
        """`file`: its descriptor, which stays the caller's."""
        self.layout = layout
        self._map = mmap.mmap(file, layout.bytes)
        self._floats: _Floats = np.frombuffer(self._map, np.float32, layout.bytes // _FLOAT)

    @classmethod
    def create(cls, layout: Layout, collective: Sequence[Shift]) -> tuple[SideChannel, Path]:
        """New memory with these collective shifts, and the name by which others open it.

        The caller unlinks the name once they did.
        """
        folder = _SHARED_MEMORY if _SHARED_MEMORY.is_dir() else None
        file, name = tempfile.mkstemp(prefix="perfit-", dir=folder)  # 0600
        try:
            os.ftruncate(file, layout.bytes)
            made = cls(layout, file)
        finally:
            os.close(file)
        for number, shift in enumerate(collective):
            made._write(made._collective(number), shift)
        return made, Path(name)

    @classmethod
    def open(cls, layout: Layout, name: Path) -> SideChannel:
        file = os.open(name, os.O_RDWR)
        try:
            return cls(layout, file)
        finally:
            os.close(file)

    # -- for the engine ------------------------------------------------------------------------

    def fill(self, slot: int, shift: Shift) -> None:
        """Put one user's tensors there."""
        self._write(self._slot(slot), shift)

    def clear(self, slot: int) -> None:
        self._slot(slot)[:] = 0

    # -- for workers ---------------------------------------------------------------------------

    def collective(self, number: int, device: torch.device) -> dict[int, Phi]:
        """φ₁ of the artefact of this number."""
        shape = self.layout.shapes[number]
        return _read(self._collective(number), shape, shape.collective_rank, device)

    def personal(self, slot: int, number: int, device: torch.device) -> dict[int, Phi]:
        """A copy of what lies in the slot: φ₂ for the artefact of this number."""
        shape = self.layout.shapes[number]
        return _read(self._slot(slot), shape, shape.personal_rank, device)

    # -- helpers -------------------------------------------------------------------------------

    def _collective(self, number: int) -> _Floats:
        sizes = [shape.floats(shape.collective_rank) for shape in self.layout.shapes]
        start = sum(sizes[:number])
        return self._floats[start : start + sizes[number]]

    def _slot(self, slot: int) -> _Floats:
        start = len(self._floats) - (self.layout.slots - slot) * self.layout.slot_floats
        return self._floats[start : start + self.layout.slot_floats]

    @staticmethod
    def _write(room: _Floats, shift: Shift) -> None:
        at = 0
        for layer in sorted(shift):
            for tensor in shift[layer]:
                count = tensor.numel()
                # Straight into the room: a copy on the way would be one more to overwrite.
                torch.from_numpy(room[at : at + count]).copy_(tensor.reshape(-1))
                at += count


def _read(room: _Floats, shape: _Shape, rank: int, device: torch.device) -> dict[int, Phi]:
    """Tensors of a shift by layer, with U = 1 in front, copied."""
    at, found = 0, {}
    for layer in sorted(shape.layers):
        parts = []
        for size in ((1, rank, shape.hidden), (1, rank, shape.hidden), (1, rank)):
            count = int(np.prod(size))
            view = torch.from_numpy(room[at : at + count]).reshape(size)
            parts.append(view.clone() if device.type == "cpu" else view.to(device))
            at += count
        found[layer] = Phi(*parts)
    return found
