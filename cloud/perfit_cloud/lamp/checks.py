"""What files of runs must be like to be read: other machines and versions wrote them, perhaps by half."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from perfit_cloud.lamp.results import UserResult

__all__ = ["DAMAGED", "MODES", "SECONDS", "check_user", "checked_drift", "checked_settings", "seconds_of"]

# φ₁ alone is "collective"; stage 1 trained φ₂∘φ₁, which is "seed", where every user starts.
MODES = ("base", "collective", "seed", "personal", "other")
# What took a run's time: what everybody shares, everybody's own state, losses and answers; by the words
# that older versions had for it.
_OLD_SECONDS = {"stage1": "preparation", "stage2": "fit", "evaluation": "answers"}
SECONDS = tuple(_OLD_SECONDS.values())
# What reading a file that something else has written may raise.
DAMAGED = (OSError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)


def seconds_of(seconds: Mapping[str, float]) -> dict[str, float]:
    """By the names of today. Raises ValueError or TypeError on what are no seconds."""
    found = {_OLD_SECONDS.get(part, part): float(value) for part, value in seconds.items()}
    if not all(0 <= value < math.inf for value in found.values()):
        raise ValueError("seconds below 0")
    return found


def check_user(user: UserResult) -> None:
    """Raise ValueError on results that no run has written."""
    for query in user.queries:
        losses, answers, origins = query.loss, query.answers, query.origins
        texts = (query.id, query.gold, *answers.values(), *(() if origins is None else (origins,)))
        if not (
            losses and losses.keys() == answers.keys() <= set(MODES) and _is_count(query.tokens, least=1)
        ):
            raise ValueError("modes or tokens")
        if not all(isinstance(text, str) for text in texts):
            raise ValueError("texts")
        if not all(isinstance(loss, int | float) for loss in losses.values()):
            raise ValueError("losses")
    counts = (user.examples, user.steps)
    if not user.queries or not all(map(_is_count, counts)) or not isinstance(user.user_id, str):
        raise ValueError("no queries, or counts that are none")


def _is_count(value: object, least: int = 0) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def checked_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Raises ValueError where what reports read has another type."""
    kinds: Mapping[str, type | tuple[type, ...]] = {
        **dict.fromkeys(("seed", "users", "collective_rank", "personal_rank", "personal_parameters"), int),
        **dict.fromkeys(("communities", "hidden_size", "blocks", "answer_tokens"), int),
        **dict.fromkeys(("method", "model", "prompts", "histories", "positions", "fingerprint"), str),
        **dict.fromkeys(("collective_users", "collective_group", "examples", "queries"), (int, type(None))),
        **dict.fromkeys(("stop", "layers"), list),
        **dict.fromkeys(("frequency_penalty", "presence_penalty"), (int, float)),
        "decoding": dict,
    }
    if "model" not in settings:
        raise ValueError("no settings")
    for name, kind in kinds.items():
        if name in settings and not isinstance(settings[name], kind):
            raise ValueError(f"{name} is of another type")
    if not all(_is_count(layer) for layer in settings.get("layers", ())):
        raise ValueError("layers")
    if not settings.get("positions", "").replace("+", "").isalnum() and "positions" in settings:
        raise ValueError("positions")
    return settings


def checked_drift(raw: Any) -> Mapping[str, Any] | None:
    """As `drift_results.drift_of` gives it. Raises one of DAMAGED on anything else."""
    if raw is None:
        return None

    def bounds(pair: Any) -> list[float] | None:
        return None if pair is None else [float(bound) for bound in pair]

    return {
        mode: {
            "nats": float(of["nats"]),
            "unchanged": float(of["unchanged"]),
            "intervals": {name: bounds(of["intervals"][name]) for name in ("nats", "unchanged")},
            "prompts": int(of["prompts"]),
        }
        for mode, of in raw.items()
    }
