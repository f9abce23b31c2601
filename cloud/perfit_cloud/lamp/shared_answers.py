"""Answers that another run has already: those of the untouched model, and of the same collective state.

Methods that are compared on the same people all measure what the untouched model says to their queries. A
run that names another one takes these answers from there, where what decides them is the same.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from perfit_cloud.lamp.results import QueryResult, Run
from perfit_shared.errors import InvalidInput

__all__ = ["SharedAnswers"]

# What decides an answer of a state that is nobody's own, besides that state; `asked` has all prompts.
_DECIDING = (
    "fingerprint",
    "dtype",
    "asked",
    "seed",
    "chat",
    "decoding",
    "answer_tokens",
    "stop",
    "frequency_penalty",
    "presence_penalty",
)


@dataclass(frozen=True)
class SharedAnswers:
    """By user and mode; empty where no run is named."""

    modes: frozenset[str] = frozenset()
    results: Mapping[str, tuple[QueryResult, ...]] | None = None

    @classmethod
    def of(cls, folder: Path | None, settings: Mapping[str, Any]) -> Self:
        """Those of the finished run in `folder` that a run with these settings would make again.

        Raises InvalidData without a finished run, InvalidInput where it asked something else.
        """
        if folder is None:
            return cls()
        run = Run.load(folder)
        ours: Mapping[str, Any] = json.loads(json.dumps(settings))
        differing = [name for name in _DECIDING if run.settings.get(name) != ours.get(name)]
        if differing:
            names = ", ".join(name.replace("_", " ") for name in differing)
            raise InvalidInput(f"{folder} differs from this run in {names}, so its answers are others")
        modes = {"base"}
        if (state := _collective(ours)) is not None and state == _collective(run.settings):
            modes |= {"collective", "seed"}
        return cls(frozenset(modes & {*run.modes}), {user.user_id: user.queries for user in run.users})

    def result(self, user_id: str, mode: str) -> tuple[QueryResult, ...] | None:
        """The user's queries with this mode alone; None where it is to be measured."""
        if mode not in self.modes or self.results is None or user_id not in self.results:
            return None
        return tuple(
            replace(query, loss={mode: query.loss[mode]}, answers={mode: query.answers[mode]})
            for query in self.results[user_id]
        )


def _collective(settings: Mapping[str, Any]) -> Any:
    """Which collective shift and LoRA are used; None for neither."""
    found = settings.get("artefact"), (settings.get("lora") or {}).get("version")
    return found if any(found) else None
