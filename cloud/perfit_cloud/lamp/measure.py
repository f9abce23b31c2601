"""Losses and answers on held-out queries, with everybody's own shift, someone else's, or none."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from perfit_cloud.engine.generation.static import generate_batch
from perfit_cloud.engine.gradients.stateless import GradientEngine
from perfit_cloud.engine.interface import ShiftUse
from perfit_cloud.lamp.people import Person, Question
from perfit_cloud.lamp.results import QueryResult
from perfit_cloud.model.artefacts import Artefact
from perfit_cloud.model.base import BaseModel
from perfit_shared.errors import InvalidInput
from perfit_shared.shifts import ShiftTensors
from perfit_shared.tasks import Task
from perfit_shared.types import Mode, Sampling

__all__ = ["Decoding", "measure", "use_of"]

_TOGETHER = 32  # prompts that are answered in one batch


@dataclass(frozen=True)
class Decoding:
    """How answers are drawn; the defaults are the paper's. Temperature 0: greedy."""

    temperature: float = 0.1
    top_k: int = 10
    top_p: float = 0.9
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises InvalidInput."""
        if not 0 <= self.temperature <= 100:
            raise InvalidInput("a temperature should be from 0 (greedy) to 100")

    def sampling(self, task: Task, user_id: str, question: Question) -> Sampling:
        """A seed of each query's own, so that no draw depends on who else is asked."""
        name = f"{self.seed}/{user_id}/{question.id}".encode()
        return Sampling(
            max_new_tokens=task.answer_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            stop=task.stop,
            seed=int.from_bytes(hashlib.sha256(name).digest()[:7], "big"),
        )


def use_of(mode: str, artefact: Artefact, own: ShiftTensors | None, other: ShiftTensors | None) -> ShiftUse:
    """The shift of one of results.MODES; who has no shift of their own uses the seed."""
    if mode == "base":
        return ShiftUse(Mode.BASE)
    if mode == "collective":
        return ShiftUse(Mode.COLLECTIVE, artefact)
    tensors = {"seed": None, "personal": own, "other": other}[mode]
    return ShiftUse(Mode.PERSONAL, artefact, artefact.seed if tensors is None else tensors)


def measure(
    base: BaseModel,
    engine: GradientEngine,
    task: Task,
    people: Sequence[Person],
    *,
    uses: Sequence[Mapping[str, ShiftUse]],
    decoding: Decoding,
    done: Callable[[int], None],
) -> list[list[QueryResult]]:
    """Every query of these people in every mode of their `uses` (by mode), in their order.

    `done` is told how many answers a batch gave.
    Which prompts share a batch is a function of the people alone, so the answers are too.
    """
    modes = list(uses[0])
    asked = [(at, question) for at, person in enumerate(people) for question in person.questions]
    loss: list[dict[str, float]] = [{} for _ in asked]
    answers: list[dict[str, str]] = [{} for _ in asked]
    for mode in modes:
        start = 0
        for at, person in enumerate(people):
            scores = engine.score([q.pair for q in person.questions], uses[at][mode])
            for score in scores:
                loss[start][mode] = -score.log_likelihood / score.tokens
                start += 1
    by_length = sorted(range(len(asked)), key=lambda i: len(asked[i][1].pair[0]))
    for chunk in (by_length[k : k + _TOGETHER] for k in range(0, len(by_length), _TOGETHER)):
        prompts = [asked[i][1].pair[0] for i in chunk]
        samplings = [decoding.sampling(task, people[asked[i][0]].user_id, asked[i][1]) for i in chunk]
        for mode in modes:
            texts = generate_batch(base, prompts, [uses[asked[i][0]][mode] for i in chunk], samplings)
            for i, text in zip(chunk, texts, strict=True):
                answers[i][mode] = task.parse(text)
            done(len(chunk))
    results: list[list[QueryResult]] = [[] for _ in people]
    for (at, question), its_loss, its_answers in zip(asked, loss, answers, strict=True):
        tokens = len(question.pair[1])
        results[at].append(QueryResult(question.id, question.gold, tokens, its_loss, its_answers))
    return results
