"""What a run's drift files say (`drift` writes them), without the model.

    OUT/drift.json                   {"tokens", "base", "shared": {mode: Answered}}
    OUT/users/{user_id}/drift.json   Answered, by the user's own state

Of every prompt: tokens of the untouched model's answer, its log-likelihood there, and what states that are
nobody's own make of it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from perfit_cloud.lamp.results import Run, UserFolder
from perfit_cloud.lamp.scores import combine
from perfit_cloud.lamp.statistics import Statistic, interval
from perfit_shared.errors import InvalidData

__all__ = ["FILE", "Answered", "drift_of"]

FILE = "drift.json"


@dataclass(frozen=True)
class Answered:
    """One state's part, by prompt that the untouched model has an answer to."""

    log_likelihoods: tuple[float, ...]  # of the untouched model's answer, nats
    same: tuple[bool, ...]  # whether the greedy answer is that

    @classmethod
    def load(cls, path: Path) -> Answered:
        """Raises InvalidData."""
        try:
            raw = json.loads(path.read_text("utf-8"))
            return cls(tuple(map(float, raw["log_likelihoods"])), tuple(map(bool, raw["same"])))
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise InvalidData(f"{path} cannot be read; remove it and run again") from error


def drift_of(run: Run) -> Mapping[str, Any] | None:
    """By mode {"nats", "unchanged", "intervals": {"nats", "unchanged"}, "prompts"}; None of a run without it.

    All prompts of all users count alike; intervals (95 %) draw users, and are None for what is nobody's own.
    """
    if run.kept:
        return run.kept_drift
    path = run.folder / FILE
    if not path.is_file():
        return None
    try:
        raw = json.loads(path.read_text("utf-8"))
        tokens, base = np.array(raw["tokens"], float), np.array(raw["base"], float)
        found = {mode: [Answered(**answered)] for mode, answered in raw["shared"].items()}
    except (ValueError, TypeError, KeyError) as error:
        raise InvalidData(f"{path} cannot be read; remove it and run again") from error
    paths = [UserFolder(run.folder, user.user_id).path / FILE for user in run.users]
    if "personal" in run.modes and all(each.is_file() for each in paths):
        found["personal"] = [Answered.load(each) for each in paths]
    return {mode: _summary(answered, base, tokens) for mode, answered in found.items()} if len(base) else None


def _summary(users: Sequence[Answered], base: Any, tokens: Any) -> dict[str, Any]:
    sums: Mapping[str, list[list[float]]] = {
        "nats": [[float((base - user.log_likelihoods).sum()), float(tokens.sum())] for user in users],
        "unchanged": [[float(sum(user.same)), float(len(user.same))] for user in users],
    }
    statistics = {
        name: Statistic(np.array(rows), partial(combine, "mean"), name == "unchanged")
        for name, rows in sums.items()
    }
    return {
        **{name: statistic.value for name, statistic in statistics.items()},
        "prompts": len(base),
        "intervals": {name: interval(statistic) for name, statistic in statistics.items()},
    }
