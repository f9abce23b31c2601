"""Where shifts start: near the identity, or at the one of several starts that suits a person best."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from perfit_shared.shifts import LayerShift, ShiftSpec, ShiftTensors
from perfit_shared.types import Score
from perfit_shared.validation import mean_loss

__all__ = ["CHOOSING", "LEAST_TO_CHOOSE", "MOST_STARTS", "choose_start", "near_identity"]

MOST_STARTS = 17  # of an artefact: the plain seed and those of 16 communities
LEAST_TO_CHOOSE = 3  # examples; with fewer a person starts at the plain seed
CHOOSING = 20  # latest examples that a person chooses by, at most


def choose_start(scores: Sequence[Sequence[Score]]) -> int:
    """The start with the lowest loss on a person's examples; the first of equals, 0 for too few examples.

    `scores`: of every start, the same examples, oldest first; the first start is the plain seed.
    """
    if len(scores[0]) < LEAST_TO_CHOOSE:
        return 0
    losses = [mean_loss(each[-CHOOSING:]) for each in scores]
    return losses.index(min(losses))


def near_identity(spec: ShiftSpec, rank: int, *, seed: int, size: float) -> ShiftTensors:
    """Random orthonormal R; W off R, and b off zero, by normal noise of this size.

    On a state x of d numbers φ(x) − x is then about size·√r·‖x‖ long.
    """
    rng = np.random.default_rng(seed)
    layers = {}
    for layer, shift in ShiftTensors.identity(spec, rank, seed).layers.items():
        noise = rng.standard_normal(shift.source.shape).astype(np.float32)
        bias = rng.standard_normal(rank).astype(np.float32)
        layers[layer] = LayerShift(shift.rotation, shift.source + size * noise, size * bias)
    return ShiftTensors(layers)
