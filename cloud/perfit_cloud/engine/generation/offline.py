"""Answers to many prompts that are all known beforehand, for research; nothing is streamed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from perfit_cloud.engine.generation.continuous import GenerationEngine, can_share
from perfit_cloud.engine.generation.static import generate_batch
from perfit_cloud.engine.interface import GenerationSettings, ShiftUse
from perfit_cloud.model.base import BaseModel
from perfit_shared.errors import InvalidInput
from perfit_shared.types import Sampling

__all__ = ["generate_all"]

_TOGETHER = 32  # prompts that are answered in one static batch
_AT_ONCE = 64  # answers under way in a continuous batch
_CACHE_TOKENS = 32_768  # of a continuous batch; more where one prompt needs more


def generate_all(
    base: BaseModel,
    prompts: Sequence[list[int]],
    uses: Sequence[ShiftUse],
    samplings: Sequence[Sampling],
    *,
    done: Callable[[int], None] = lambda count: None,
    model: Any = None,
) -> list[str]:
    """The answer to each prompt under its shift and sampling. `done` gets the number of answers that ended.

    In one continuous batch, which takes up a prompt where an answer ends; in static ones where the model
    cannot share it, or where the hooks of `model`, a tree of the base's weights, run too.
    Which prompts share a pass is a function of the arguments alone, so the answers are too.

    Raises InvalidPrompt when a prompt is empty or does not fit the model's context together with its
    answer, InvalidInput unless there are as many uses and samplings as prompts.
    """
    if not len(prompts) == len(uses) == len(samplings):
        raise InvalidInput("every prompt needs one shift and one sampling")
    if model is None and can_share(base):
        return _continuous(base, prompts, uses, samplings, done)
    texts = [""] * len(prompts)
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for chunk in (by_length[k : k + _TOGETHER] for k in range(0, len(by_length), _TOGETHER)):
        answers = generate_batch(
            base,
            [prompts[i] for i in chunk],
            [uses[i] for i in chunk],
            [samplings[i] for i in chunk],
            model=model,
        )
        for i, text in zip(chunk, answers, strict=True):
            texts[i] = text
        done(len(chunk))
    return texts


def _continuous(
    base: BaseModel,
    prompts: Sequence[list[int]],
    uses: Sequence[ShiftUse],
    samplings: Sequence[Sampling],
    done: Callable[[int], None],
) -> list[str]:
    most = max((len(p) + s.max_new_tokens for p, s in zip(prompts, samplings, strict=True)), default=0)
    settings = GenerationSettings(cache_tokens=max(_CACHE_TOKENS, 2 * most), max_requests=_AT_ONCE)
    # Engines know artefacts by name, and two of these may have the same.
    distinct = {id(use.artefact): use.artefact for use in uses if use.artefact is not None}
    named = {key: replace(artefact, name=str(n)) for n, (key, artefact) in enumerate(distinct.items())}
    uses = [replace(use, artefact=named.get(id(use.artefact))) for use in uses]
    engine = GenerationEngine(base, {one.name: one for one in named.values()}, settings)
    return engine.answer_all(prompts, uses, samplings, done)
