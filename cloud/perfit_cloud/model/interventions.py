"""φ on hidden states: a pure function, the active interventions of a pass, and hooks that apply them.

The active interventions of one forward pass are a list of groups. A group holds, for U owners, the rows
(flattened batch × time) to shift and the tensors to shift them with. Hooks are registered once on a module
tree. They read the interventions that are active in their own thread, so threads cannot see each other's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from perfit_cloud.model.blocks import block_list, hidden_of, with_hidden
from perfit_shared.shifts import ShiftTensors

__all__ = [
    "Intervention",
    "Phi",
    "Shift",
    "ShiftGroup",
    "active_interventions",
    "groups_of",
    "hooked",
    "install",
    "phi",
    "row_index",
    "shift_rows",
    "shifted_rows",
    "to_torch",
]


class Phi(NamedTuple):
    """Tensors of U owners: rotation R (U, r, d), source W (U, r, d), bias b (U, r)."""

    rotation: Tensor
    source: Tensor
    bias: Tensor


Shift = Mapping[int, Phi]  # by layer


def phi(x: Tensor, shift: Phi) -> Tensor:
    """φ(x) = x + Rᵀ(Wx + b − Rx) (PerFit, eq. 2) for x (U, k, d), in float32, in x's dtype back.

    Computed as x + ((W − R)x + b)R, so that W = R and b = 0 leave every bit as it was.
    """
    wide = x.float()
    inner = wide @ (shift.source - shift.rotation).mT + shift.bias.unsqueeze(-2)  # (U, k, r)
    return (wide + inner @ shift.rotation).to(x.dtype)


def to_torch(tensors: ShiftTensors, device: torch.device) -> dict[int, Phi]:
    """One owner's tensors by layer, float32, with U = 1 in front."""
    return {
        layer: Phi(*(torch.tensor(array, device=device).unsqueeze(0) for array in shift))
        for layer, shift in tensors.layers.items()
    }


def stack(shifts: Sequence[Shift]) -> dict[int, Phi]:
    """Tensors of several owners as one, by layer; all must have the same layers and rank."""
    return {
        layer: Phi(*(torch.cat(parts) for parts in zip(*(s[layer] for s in shifts), strict=True)))
        for layer in shifts[0]
    }


@dataclass(frozen=True)
class ShiftGroup:
    """Rows of U owners who share a collective shift.

    `index` (U, k): rows of hidden.view(-1, d), padded with an owner's own first row where owners
    have different counts; `valid` (U, k) marks the real ones, None when all are.
    """

    index: Tensor
    valid: Tensor | None
    collective: Shift
    personal: Shift | None  # U owners, or one for all


def row_index(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor | None]:
    """(index, valid) of a ShiftGroup from each owner's rows; every owner has at least one."""
    most = max(map(len, rows))
    index = torch.tensor([[*r, *[r[0]] * (most - len(r))] for r in rows], device=device)
    if all(len(r) == most for r in rows):
        return index, None
    counts = torch.tensor([len(r) for r in rows], device=device)
    return index, torch.arange(most, device=device) < counts.unsqueeze(1)


@dataclass(frozen=True, eq=False)
class Intervention:
    """Which positions of one request's prompt are shifted, and with what. None of them in BASE mode."""

    positions: tuple[int, ...] = ()  # ascending
    collective: Shift = field(default_factory=dict)  # one object for all requests of an artefact
    personal: Shift | None = None


def groups_of(rows: Iterable[tuple[Intervention, Sequence[int]]], device: torch.device) -> list[ShiftGroup]:
    """The rows that each request shifts, as one group for each artefact, with φ₂ and without."""
    alike: dict[tuple[int, bool], list[tuple[Intervention, Sequence[int]]]] = {}
    for shift, of_request in rows:
        if of_request:
            key = (id(shift.collective), shift.personal is not None)
            alike.setdefault(key, []).append((shift, of_request))
    groups = []
    for members in alike.values():
        index, valid = row_index([of_request for _, of_request in members], device)
        personal = [shift.personal for shift, _ in members if shift.personal is not None]
        groups.append(
            ShiftGroup(index, valid, members[0][0].collective, stack(personal) if personal else None)
        )
    return groups


def shift_rows(hidden: Tensor, group: ShiftGroup, layer: int) -> Tensor:
    """hidden (B, T, d) with φ₂∘φ₁ of this layer on the group's rows, the rest untouched."""
    if layer not in group.collective:
        return hidden
    flat, index = hidden.reshape(-1, hidden.shape[-1]), group.index.to(hidden.device)
    x = shifted_rows(flat[index], group, layer)
    if group.valid is not None:
        valid = group.valid.to(hidden.device)
        x, index = x[valid], index[valid]
    return flat.index_copy(0, index.reshape(-1), x.reshape(-1, flat.shape[-1])).view_as(hidden)


def shifted_rows(x: Tensor, group: ShiftGroup, layer: int) -> Tensor:
    """φ₂(φ₁(x)) of this layer for x (U, k, d), the rows of the group's owners."""
    x = phi(x, _at(x, group.collective[layer]))
    return x if group.personal is None else phi(x, _at(x, group.personal[layer]))


def _at(x: Tensor, shift: Phi) -> Phi:
    """The shift on the device of x. Its gradients arrive where it was."""
    return shift if shift.bias.device == x.device else Phi(*(tensor.to(x.device) for tensor in shift))


_ACTIVE: ContextVar[Sequence[ShiftGroup]] = ContextVar("perfit_active_interventions", default=())


@contextlib.contextmanager
def active_interventions(groups: Sequence[ShiftGroup]) -> Iterator[None]:
    """Make `groups` what the hooks of this thread apply, until the end of the block."""
    token = _ACTIVE.set(groups)
    try:
        yield
    finally:
        _ACTIVE.reset(token)


def install(model: Any, layers: Iterable[int]) -> list[Any]:
    """Register hooks on the outputs of these blocks. Returns handles; their remove() takes them off."""
    blocks = block_list(model)
    return [blocks[layer].register_forward_hook(_hook(layer)) for layer in sorted(set(layers))]


@contextlib.contextmanager
def hooked(model: Any, layers: Iterable[int]) -> Iterator[None]:
    """`install` for the length of a block."""
    handles = install(model, layers)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook(layer: int) -> Any:
    def apply(_module: nn.Module, _args: Any, output: Any) -> Any:
        groups = _ACTIVE.get()
        if not groups:
            return None
        hidden = hidden_of(output)
        for group in groups:
            hidden = shift_rows(hidden, group, layer)
        return with_hidden(output, hidden)

    return apply
