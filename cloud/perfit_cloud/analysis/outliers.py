"""Who lies closest to the collective vector, in the middle, and farthest (the paper's Figures 11 to 14)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from perfit_cloud.analysis.deltas import Array
from perfit_cloud.analysis.queries import AskingUser
from perfit_cloud.analysis.spectrum import Doubles

__all__ = ["Placed", "place_users", "sample_texts"]

_EACH = 10
_LETTERS, _CHUNK = 400, 1024


@dataclass(frozen=True)
class Placed:
    where: str  # closest, middle or farthest
    number: int  # of the user in the file
    distance: float  # ‖δ − mean‖


def place_users(rows: Array, mean: Doubles, numbers: npt.NDArray[np.int64]) -> list[Placed]:
    """Ten each, fewer of fewer than thirty users, nobody twice; each ten by distance."""
    distances = np.concatenate(
        [np.linalg.norm(rows[at : at + _CHUNK] - mean, axis=1) for at in range(0, len(rows), _CHUNK)]
    )
    order = np.argsort(distances, kind="stable")
    each = min(_EACH, len(order) // 3)
    start = (len(order) - each) // 2
    parts = {
        "closest": order[:each],
        "middle": order[start : start + each],
        "farthest": order[len(order) - each :],
    }
    return [Placed(w, int(numbers[i]), float(distances[i])) for w, chosen in parts.items() for i in chosen]


def sample_texts(users: Iterable[AskingUser], wanted: Iterable[int]) -> dict[int, tuple[str, str]]:
    """(user id, the beginning of what was retrieved for the first query) of these users, by number."""
    left = set(wanted)
    found = {}
    for user in users:
        if not left:
            break
        if user.number in left:
            left.discard(user.number)
            found[user.number] = (user.user_id, user.questions[0].history[:_LETTERS])
    return found
