"""How well the cloud answers for this user: loss and task metric, with and without their shift.

Also what binds an update to a cloud: gradients and losses of history items.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from functools import partial
from threading import Event
from typing import TypeVar

import numpy as np

from perfit_device.cloud import Cloud
from perfit_device.codec import Artefact, Limits, Message, Prompt, Sampling, Score, ShiftUse
from perfit_device.history import HistoryItem
from perfit_device.patience import IMPATIENT, Patience
from perfit_shared.errors import InvalidData, InvalidPrompt, PerfitError
from perfit_shared.shifts import LayerShift, ShiftTensors
from perfit_shared.tasks import Task

__all__ = ["answers", "gradient_of", "mean_loss", "prompt_of"]

_T = TypeVar("_T")
_SCORES_A_CALL = 16  # candidates; fewer where the cloud says so
_IN_FLIGHT = 8  # Generate calls at a time


def prompt_of(task: Task, item: HistoryItem, *, cut: bool = False) -> Prompt:
    """What the model reads for an item: text, or the user's turn of a chat."""
    text = task.prompt(item.fields, cut=cut)
    return [Message("user", text)] if task.chat else text


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

    size = min(_SCORES_A_CALL, limits.examples)
    chunks = [items[start : start + size] for start in range(0, len(items), size)]
    scores = [each for chunk in chunks for each in _naming_the_refused(score, chunk)]
    return -sum(each.log_likelihood for each in scores) / sum(each.tokens for each in scores)


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
    *, in_flight: int = _IN_FLIGHT, patience: Patience = IMPATIENT,
) -> list[str]:  # fmt: skip
    """Greedy answers in the order of the items, `in_flight` asked for at a time, each with `patience`."""
    leaving = Event()
    # Leaving the pool waits for its threads, and they should not sleep on meanwhile.
    patience = replace(patience, sleep=leaving.wait)
    sampling = Sampling(
        max_new_tokens=min(task.answer_tokens, limits.new_tokens), temperature=0.0, stop=task.stop
    )

    def answer(item: HistoryItem) -> str:
        pieces = patience.stream(lambda: cloud.generate(prompt_of(task, item), use, sampling))
        return task.parse("".join(piece.text for piece in pieces))

    with ThreadPoolExecutor(max_workers=in_flight) as pool:
        try:
            futures = [pool.submit(answer, item) for item in items]
            for future in as_completed(futures):
                future.result()  # the first failure ends it, however long the others would wait
            return [future.result() for future in futures]
        except BaseException:
            cloud.close()  # ends the calls in flight, for which leaving the pool would wait
            leaving.set()  # after it: who wakes up calls once more, and should find it closed
            pool.shutdown(cancel_futures=True)
            raise


def gradient_of(
    cloud: Cloud, artefact: Artefact, limits: Limits
) -> Callable[[Sequence[HistoryItem], ShiftTensors], tuple[float, int, ShiftTensors]]:
    """`Update`'s gradient by ComputeGradient, in as many calls a batch as the cloud's limit needs.

    An example that the cloud refuses is named in InvalidData.
    """
    task = artefact.task

    def once(items: Sequence[HistoryItem], tensors: ShiftTensors) -> tuple[float, int, ShiftTensors]:
        pairs = [(prompt_of(task, item, cut=True), task.target(item.fields, cut=True)) for item in items]
        loss, tokens, gradient = cloud.compute_gradient(pairs, artefact, tensors)
        if tokens < 1:
            raise PerfitError("the cloud computed a gradient over no tokens; tell its operator")
        return loss, tokens, gradient

    def gradient(items: Sequence[HistoryItem], tensors: ShiftTensors) -> tuple[float, int, ShiftTensors]:
        chunks = [items[start : start + limits.examples] for start in range(0, len(items), limits.examples)]
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
