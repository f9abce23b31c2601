"""What passes are made of: the steps of users, what was found of each so far, and how they are cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from perfit_cloud.engine.gradients.activation_cache import BatchBudget
from perfit_cloud.engine.gradients.multi_user import PassResult
from perfit_cloud.model.partial import Indices
from perfit_shared.errors import InvalidInput, InvalidTensors
from perfit_shared.shifts import LayerShift, ShiftTensors

if TYPE_CHECKING:
    from perfit_cloud.engine.gradients.session import UpdateSession

__all__ = ["GradientRequest", "PassShare", "Sum", "checked_rows", "cut_into_passes"]


@dataclass(frozen=True)
class GradientRequest:
    """One gradient that one user asks for: of examples `rows` of an adaptation, at these tensors."""

    session: UpdateSession
    rows: Sequence[int]
    personal: ShiftTensors


class Sum:
    """What passes have found of one step so far."""

    def __init__(self, step: GradientRequest) -> None:
        """Raises InvalidInput, InvalidTensors."""
        self.session, self.personal = step.session, step.personal
        arrays, rows = step.session._arrays, checked_rows(step)
        self.changing = rows[arrays.marked[rows] > 0]  # examples that the tensors change the loss of
        self.tokens = int(arrays.targets[rows].sum())
        self.loss = float(step.session._constants[rows].sum())  # nats
        self.gradient = {
            layer: LayerShift(*map(np.zeros_like, shift)) for layer, shift in step.personal.layers.items()
        }

    def add(self, outcome: PassResult, owner: int) -> None:
        self.loss += float(outcome.sums[owner])
        for layer, stacks in outcome.gradients.items():
            for array, stack in zip(self.gradient[layer], stacks, strict=True):
                np.add(array, stack[owner], out=array)


PassShare = tuple[Sum, Indices]  # whose, and which of their examples a pass takes on


def checked_rows(step: GradientRequest) -> Indices:
    """The rows of a step that can be taken. Raises InvalidInput, InvalidTensors."""
    step.session._check_open()  # a step may need no pass, which checks again
    rows = np.array(step.rows, dtype=np.int64)
    if not len(rows) or rows.min() < 0 or rows.max() >= step.session.examples:
        raise InvalidInput("a step needs examples of its adaptation")
    spec = step.session._artefact.spec
    rank, d = spec.personal_rank, spec.hidden_size
    shapes = {layer: tuple(t.shape for t in shift) for layer, shift in step.personal.layers.items()}
    if shapes != dict.fromkeys(spec.layers, ((rank, d), (rank, d), (rank,))):
        raise InvalidTensors("the tensors are not of the shapes that the artefact's spec names")
    return rows


def cut_into_passes(members: Sequence[Sum], caps: BatchBudget) -> list[list[PassShare]]:
    """Passes over all that these steps ask for, examples of like length together whoever owns them."""
    owners = np.repeat(np.arange(len(members)), [len(m.changing) for m in members])
    examples = np.concatenate([m.changing for m in members])
    rows = np.concatenate([m.session._arrays.rows[m.changing] for m in members])
    lengths = np.concatenate([m.session._arrays.lengths[m.changing] for m in members])
    made = []
    for piece in caps.cut(rows, lengths):
        shares = ((u, examples[piece[owners[piece] == u]]) for u in np.unique(owners[piece]))
        made.append([(members[u], which) for u, which in shares])
    return made
