"""How well the cloud answers for this user: loss and task metric, with and without their shift.

Also what binds an update to a cloud: gradients and losses of history items.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import numpy as np

from perfit_device.asking import ask_all
from perfit_device.cloud import Cloud
from perfit_device.codec import Artefact, Limits, Message, Prompt, Sampling, Score, ShiftUse
from perfit_device.history import HistoryItem
from perfit_device.patience import IMPATIENT, Patience
from perfit_shared.errors import InvalidData, InvalidPrompt, PerfitError
from perfit_shared.shifts import LayerShift, ShiftTensors
from perfit_shared.tasks import Task

__all__ = ["answers", "gradient_of", "mean_loss", "pair_of", "prompt_of"]

_T = TypeVar("_T")
_SCORES_A_CALL = 16  # candidates; fewer where the cloud says so
_IN_FLIGHT = 8  # questions of one Ask at a time


def prompt_of(task: Task, item: HistoryItem, *, cut: bool = False) -> Prompt:
    """What the model reads for an item: text, or the user's turn of a chat."""
    text = task.prompt(item.fields, cut=cut)
    return [Message("user", text)] if task.chat else text


def pair_of(task: Task, item: HistoryItem) -> tuple[Prompt, str]:
    """Prompt and target of an item as an update takes them."""
    return prompt_of(task, item, cut=True), task.target(item.fields, cut=True)


def mean_loss(
    cloud: Cloud,
    task: Task,
    items: Sequence[HistoryItem],
    use: ShiftUse,
    limits: Limits,
    *,
    cut: bool = False,
    patience: Patience = IMPATIENT,
) -> float:
    """Mean nats a token over all answers and their end-of-sequence tokens.

    Every call has `patience` of its own. Raises InvalidData naming the example that the cloud refuses.
    """

    def score(chunk: Sequence[HistoryItem]) -> list[Score]:
        pairs = [(prompt_of(task, item, cut=cut), task.target(item.fields, cut=cut)) for item in chunk]
        return patience.call(lambda: cloud.score(pairs, use))

    chunks = _chunks(task, items, min(_SCORES_A_CALL, limits.examples), limits.call_tokens)
    scores = [each for chunk in chunks for each in _naming_the_refused(score, chunk)]
    return -sum(each.log_likelihood for each in scores) / sum(each.tokens for each in scores)


def _chunks(
    task: Task, items: Sequence[HistoryItem], most: int, call_tokens: int
) -> list[Sequence[HistoryItem]]:
    """Parts of `items` that one call takes each: at most `most` items and `call_tokens` tokens.

    A device has no tokenizer. A token stands for a byte of UTF-8 at least, so bytes are counted, and
    one more for the end of each answer. An item that is larger goes alone, for the cloud to judge.
    """
    chunks: list[list[HistoryItem]] = [[]]
    room = call_tokens
    for item in items:
        size = sum(len(value.encode()) for value in item.fields.values()) + len(task.template.encode()) + 1
        if chunks[-1] and (len(chunks[-1]) == most or (call_tokens and size > room)):
            chunks.append([])
            room = call_tokens
        chunks[-1].append(item)
        room -= size
    return [chunk for chunk in chunks if chunk]


def _naming_the_refused(call: Callable[[Sequence[HistoryItem]], _T], items: Sequence[HistoryItem]) -> _T:
    """`call(items)`; where the cloud refuses a prompt, InvalidData names the first example to blame."""
    try:
        return call(items)
    except InvalidPrompt as error:
        for item in items:
            try:
                call([item])
            except InvalidPrompt as its_own:
                raise InvalidData(
                    f"the cloud refuses example {item.short} ({its_own}); "
                    f"`perfit history forget {item.short}` takes it out"
                ) from its_own
        raise error


def answers(
    cloud: Cloud, task: Task, items: Sequence[HistoryItem], use: ShiftUse, limits: Limits,
    *, patience: Patience = IMPATIENT,
) -> list[str]:  # fmt: skip
    """Greedy answers in the order of the items."""
    sampling = Sampling(
        max_new_tokens=min(task.answer_tokens, limits.new_tokens), temperature=0.0, stop=task.stop
    )
    questions = [(prompt_of(task, item), sampling) for item in items]
    in_flight = min(_IN_FLIGHT, limits.questions)
    return [
        task.parse(text) for text in ask_all(cloud, use, questions, in_flight=in_flight, patience=patience)
    ]


def gradient_of(
    cloud: Cloud, artefact: Artefact, limits: Limits
) -> Callable[[Sequence[HistoryItem], ShiftTensors], tuple[float, int, ShiftTensors]]:
    """Loss, tokens and gradient of a batch by ComputeGradient, in as many calls as the cloud's limit needs.

    An example that the cloud refuses is named in InvalidData.
    """
    task = artefact.task

    def once(items: Sequence[HistoryItem], tensors: ShiftTensors) -> tuple[float, int, ShiftTensors]:
        pairs = [pair_of(task, item) for item in items]
        loss, tokens, gradient = cloud.compute_gradient(pairs, artefact, tensors)
        if tokens < 1:
            raise PerfitError("the cloud computed a gradient over no tokens; tell its operator")
        return loss, tokens, gradient

    def gradient(items: Sequence[HistoryItem], tensors: ShiftTensors) -> tuple[float, int, ShiftTensors]:
        chunks = _chunks(task, items, limits.examples, limits.call_tokens)
        parts = [_naming_the_refused(partial(once, tensors=tensors), chunk) for chunk in chunks]
        return parts[0] if len(parts) == 1 else _joined(parts)

    return gradient


def _joined(parts: Sequence[tuple[float, int, ShiftTensors]]) -> tuple[float, int, ShiftTensors]:
    """One batch from its parts: means over tokens, so parts weigh as many tokens as they have."""
    tokens = sum(count for _, count, _ in parts)
    loss = sum(part_loss * count for part_loss, count, _ in parts) / tokens
    layers = {}
    for layer, first in parts[0][2].layers.items():
        sums = [np.zeros_like(array) for array in first]
        for _, count, gradient in parts:
            for i, array in enumerate(gradient.layers[layer]):
                sums[i] += np.float32(count / tokens) * array
        layers[layer] = LayerShift(*sums)
    return loss, tokens, ShiftTensors(layers)
