"""How far personal answers drift on prompts that have nothing to do with the person.

The untouched model answers each of PROMPTS, greedily. Under a shift (or whatever a method's state is) two
things are taken: how much less likely that answer has become, in nats a token, and whether the greedy answer
is still the same text. 0 nats and all answers unchanged: no drift.

`drift_results` reads what this writes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from perfit_cloud.engine.generation.offline import generate_all
from perfit_cloud.engine.gradients.stateless import GradientEngine
from perfit_cloud.engine.interface import ShiftUse
from perfit_cloud.lamp.drift_results import FILE, Answered
from perfit_cloud.lamp.measure import score_frozen
from perfit_cloud.lamp.methods.interface import Method, QueryRequest, TaskData
from perfit_cloud.lamp.people import Query
from perfit_cloud.lamp.results import UserFolder, write_json
from perfit_cloud.model.base import BaseModel
from perfit_shared.task import Task
from perfit_shared.types import Mode

__all__ = ["PROMPTS", "DriftTrial"]

PROMPTS = (
    "What is the boiling point of water at sea level?",
    "Name three colours of the rainbow.",
    "How many minutes are there in two hours?",
    "Write one sentence about a lighthouse.",
    "What do plants need in order to grow?",
    "Give the plural of the word goose.",
    "Which is heavier, a kilogram of iron or a kilogram of wool?",
    "What is seven times eight?",
    "Explain in one sentence what a bridge is for.",
    "Name a tool that is used to drive nails.",
    "What comes after Thursday?",
    "Describe the taste of a lemon.",
    "Why do people wear gloves in winter?",
    "What is the opposite of narrow?",
    "List two things that float on water.",
    "How does a bicycle stay upright?",
    "What do we call a baby sheep?",
    "Translate the word bread into French.",
    "Name the planet that is nearest to the sun.",
    "What should one do before crossing a road?",
)
_PROMPT, _REPLY = "neutral_prompt", "neutral_reply"  # fields; no task has such
_NEUTRAL = Task(
    "neutral",
    f"Question: {{{_PROMPT}}}\nAnswer:",
    f" {{{_REPLY}}}",
    "rouge_1",
    answer_tokens=32,
    chat="auto",
    chat_template=f"{{{_PROMPT}}}",
)


class DriftTrial:
    """Measures the states of one run."""

    def __init__(self, method: Method[Any], data: TaskData, out: Path) -> None:
        self._method, self._data, self._out = method, data, out
        self._task = _NEUTRAL.resolved(data.base.has_chat_template)
        self._sampling = self._task.sampling()

    def measure_shared(self) -> None:
        """The untouched model, and every state that is nobody's own."""
        path = self._out / FILE
        if path.is_file():
            return
        items = list(self._items)
        neutral = replace(self._data, task=self._task)
        pairs = [neutral.encoder.query(item).pair for item in items]
        base = ShiftUse(Mode.BASE)
        with closing(GradientEngine(self._data.base)) as engine:
            scores = score_frozen(engine, pairs, [base] * len(pairs), owners=[""] * len(pairs))
        shared = {mode: state for mode, state in self._method.shared.items() if mode != "base"}
        data = {
            "tokens": [score.tokens for score in scores],
            "base": [score.log_likelihood for score in scores],
            "shared": {mode: asdict(self._answered("", state)) for mode, state in shared.items()},
        }
        write_json(path, data)

    def measure(self, user_id: str, state: Callable[[], Any]) -> None:
        path = UserFolder(self._out, user_id).path / FILE
        if not path.is_file():
            write_json(path, asdict(self._answered(user_id, state())))

    def _answered(self, user_id: str, state: Any) -> Answered:
        requests = [
            QueryRequest(user_id, Query(str(at), item[_REPLY], item), state, self._sampling)
            for at, item in enumerate(self._items)
        ]
        with self._asked_neutrally():
            scores = self._method.score(requests)
            answers = self._method.answer(requests, lambda _count: None)
        same = (self._task.parse(a) == item[_REPLY] for a, item in zip(answers, self._items, strict=True))
        return Answered(tuple(score.log_likelihood for score in scores), tuple(same))

    @contextmanager
    def _asked_neutrally(self) -> Iterator[None]:
        """Methods ask `data.task`, so that is what changes."""
        own = self._method.data
        self._method.data = replace(own, task=self._task)
        try:
            yield
        finally:
            self._method.data = own

    @cached_property
    def _items(self) -> list[dict[str, str]]:
        """Prompts with the untouched model's answers. The fields of the run's own task hold the prompt as
        well, since some methods look for like examples by them."""
        base, task = self._data.base, self._task
        prompts = [_encoded(base, task, prompt) for prompt in PROMPTS]
        uses, samplings = [ShiftUse(Mode.BASE)] * len(prompts), [self._sampling] * len(prompts)
        answers = [task.parse(text) for text in generate_all(base, prompts, uses, samplings)]
        fields = self._data.task.field_names
        return [
            {**dict.fromkeys(fields, prompt), _PROMPT: prompt, _REPLY: answer}
            for prompt, answer in zip(PROMPTS, answers, strict=True)
            if answer
        ]


def _encoded(base: BaseModel, task: Task, prompt: str) -> list[int]:
    return base.encode_prompt(task.read_as(task.prompt({_PROMPT: prompt})))
