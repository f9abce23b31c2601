"""How well the cloud answers for this user: loss and task metric, with and without their shift.

It also computes losses and gradients of history items for an update.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import numpy as np

from perfit_device.cloud.client import Cloud
from perfit_device.cloud.codec import Artefact, Limits, Message, Prompt, ShiftUse
from perfit_device.cloud.questions import ask_all
from perfit_device.cloud.retry import NO_RETRIES, RetryPolicy
from perfit_device.history import HistoryItem
from perfit_shared.errors import ExamplesRefused, InvalidPrompt, PerfitError
from perfit_shared.retrieval import read_after
from perfit_shared.shifts import LayerShift, ShiftTensors
from perfit_shared.tasks import Task
from perfit_shared.types import Score
from perfit_shared.validation import mean_loss

__all__ = [
    "Before",
    "Judged",
    "TaskClient",
    "gradient_of",
    "nothing_before",
    "pair_of",
    "prompt_of",
    "prompts_of",
    "refusal",
]

_T = TypeVar("_T")
_SCORES_A_CALL = 16  # candidates; fewer where the cloud says so
_IN_FLIGHT = 8  # questions of one Ask at a time
_ACCEPTED_IN_A_ROW = 4  # examples, after which shorter ones count as accepted
_NAMED = 8  # examples in a message

Before = Callable[[HistoryItem], Sequence[Mapping[str, str]]]  # own examples that an item is read behind


def nothing_before(item: HistoryItem) -> Sequence[Mapping[str, str]]:
    return ()


def prompt_of(
    task: Task, item: HistoryItem, *, cut: bool = False, before: Sequence[Mapping[str, str]] = ()
) -> Prompt:
    """What the model reads for an item behind the examples `before`: text, or the turns of a chat."""
    read = read_after(task, before, item.fields, cut=cut)
    return read if isinstance(read, str) else [Message(role, content) for role, content in read]


def prompts_of(
    task: Task, item: HistoryItem, before: Sequence[Mapping[str, str]], notify: Callable[[str], None]
) -> Iterator[Prompt]:
    """Behind these examples, and for a cloud that refuses that, alone. How many fit is a device's guess."""
    if before:
        yield prompt_of(task, item, before=before)
        notify("the cloud refuses the question behind your examples, so it is asked without them")
    yield prompt_of(task, item)


def pair_of(
    task: Task, item: HistoryItem, *, cut: bool = True, before: Sequence[Mapping[str, str]] = ()
) -> tuple[Prompt, str]:
    """Prompt and target of an item; `cut` as an update takes them."""
    return prompt_of(task, item, cut=cut, before=before), task.target(item.fields, cut=cut)


@dataclass(frozen=True)
class Judged:
    """Scores and answers of items under one shift; an InvalidPrompt where the cloud refuses an item."""

    scores: Sequence[Score | InvalidPrompt]
    answers: Sequence[str | InvalidPrompt]

    def is_whole(self, row: int) -> bool:
        return isinstance(self.scores[row], Score) and isinstance(self.answers[row], str)

    def loss(self, rows: Sequence[int]) -> float:
        """Mean nats a token over these."""
        return mean_loss([score for row in rows if isinstance(score := self.scores[row], Score)])

    def texts(self, rows: Sequence[int]) -> list[str]:
        return [str(self.answers[row]) for row in rows]


@dataclass(frozen=True)
class TaskClient:
    """One task at one cloud: losses and answers of items under a shift.

    Every call has the retries of `retry_policy`. `progress` gets the number of items done.
    """

    cloud: Cloud
    task: Task
    limits: Limits
    retry_policy: RetryPolicy = NO_RETRIES
    before: Before = nothing_before

    def judge(
        self, items: Sequence[HistoryItem], use: ShiftUse, progress: Callable[[int], None] = lambda _: None
    ) -> Judged:
        """Score and answer (greedily) all items. `progress` gets how many of 2 · len(items) are done."""
        scored = self.scores(items, use, progress=progress)
        done = len(items)
        return Judged(scored, self.answers(items, use, progress=lambda more: progress(done + more)))

    def all_scores(self, items: Sequence[HistoryItem], use: ShiftUse, *, cut: bool = False) -> list[Score]:
        """Of every item's answer. Raises ExamplesRefused, also for what is refused only behind examples."""
        found = self.scores(items, use, cut=cut, or_alone=False)
        _check_refused(items, found)
        return [score for score in found if isinstance(score, Score)]

    def scores(
        self,
        items: Sequence[HistoryItem],
        use: ShiftUse,
        *,
        cut: bool = False,
        or_alone: bool = True,
        progress: Callable[[int], None] = lambda _: None,
    ) -> list[Score | InvalidPrompt]:
        """Of every item's answer, or why the cloud refuses the item: `or_alone`, also without examples."""
        task = self.task

        def score(chunk: Sequence[HistoryItem]) -> list[Score]:
            pairs = [pair_of(task, item, cut=cut, before=self.before(item)) for item in chunk]
            return self.retry_policy.call(lambda: self.cloud.score(pairs, use))

        most = min(_SCORES_A_CALL, self.limits.examples)
        found: list[Score | InvalidPrompt] = []
        for chunk in _chunks(task, items, most, self.limits.call_tokens, self.before):
            found += _each(score, chunk)
            progress(len(found))
        if not or_alone:
            return found
        return self._or_alone(items, found, lambda alone, rest: alone.scores(rest, use, cut=cut))

    def answers(
        self, items: Sequence[HistoryItem], use: ShiftUse, progress: Callable[[int], None] = lambda _: None
    ) -> list[str | InvalidPrompt]:
        """Greedy answers in the order of the items, or why the cloud refuses an item. As `scores`."""
        task, limits = self.task, self.limits
        sampling = task.sampling(most=limits.new_tokens)
        refused: dict[int, InvalidPrompt] = {}
        texts = ask_all(
            self.cloud,
            use,
            [(prompt_of(task, item, before=self.before(item)), sampling) for item in items],
            in_flight=min(_IN_FLIGHT, limits.questions),
            retry_policy=self.retry_policy,
            refused=refused,
            progress=progress,
        )
        found = [refused.get(number) or task.parse(text) for number, text in enumerate(texts)]
        return self._or_alone(items, found, lambda alone, rest: alone.answers(rest, use))

    def _or_alone(
        self,
        items: Sequence[HistoryItem],
        found: Sequence[_T | InvalidPrompt],
        again: Callable[[TaskClient, Sequence[HistoryItem]], Sequence[_T | InvalidPrompt]],
    ) -> list[_T | InvalidPrompt]:
        """What was refused behind examples once more without them, as a question would be asked."""
        values = list(found)
        refused = [row for row, value in enumerate(found) if isinstance(value, InvalidPrompt)]
        if rows := [row for row in refused if self.before(items[row])]:
            alone = replace(self, before=nothing_before)
            for row, value in zip(rows, again(alone, [items[row] for row in rows]), strict=True):
                values[row] = value
        return values

    def refused_among(self, items: Sequence[HistoryItem], most: int | None = None) -> list[HistoryItem]:
        """The examples that the cloud refuses, as an update takes them.

        Only the cloud knows, since it has the tokenizer. The search goes from the longest down until some
        in a row are accepted, or `most` were tried; a missed one is refused by name later.
        """
        found, accepted = [], 0
        for item in sorted(items, key=partial(_length, before=self.before), reverse=True)[:most]:
            pair = pair_of(self.task, item, before=self.before(item))
            try:
                self.retry_policy.call(partial(self.cloud.score, [pair], ShiftUse()))
                accepted += 1
            except InvalidPrompt:
                found.append(item)
                accepted = 0
            if accepted == _ACCEPTED_IN_A_ROW:
                break
        return found


def _chunks(
    task: Task, items: Sequence[HistoryItem], most: int, call_tokens: int, before: Before
) -> list[Sequence[HistoryItem]]:
    """Parts of `items` that one call takes each: at most `most` items and `call_tokens` tokens.

    A device has no tokenizer. A token stands for at least one byte of UTF-8, so the device counts bytes,
    plus one for the end of each answer. A larger item goes alone, and the cloud decides.
    """
    chunks: list[list[HistoryItem]] = [[]]
    room = call_tokens
    for item in items:
        turns = 1 + len(before(item))
        size = _length(item, before) + turns * len(task.template.encode()) + len(task.system.encode()) + turns
        if chunks[-1] and (len(chunks[-1]) == most or (call_tokens and size > room)):
            chunks.append([])
            room = call_tokens
        chunks[-1].append(item)
        room -= size
    return [chunk for chunk in chunks if chunk]


def _each(
    call: Callable[[Sequence[HistoryItem]], Sequence[_T]], items: Sequence[HistoryItem]
) -> list[_T | InvalidPrompt]:
    """`call(items)`; where the cloud refuses a prompt, one by one, with its error in place of a value."""
    try:
        return [*call(items)]
    except InvalidPrompt as error:
        if len(items) == 1:
            return [error]
        return [value for item in items for value in _each(call, [item])]


def _length(item: HistoryItem, before: Before) -> int:
    """Bytes of its fields, and of those before it."""
    return sum(len(text.encode()) for fields in (item.fields, *before(item)) for text in fields.values())


def gradient_of(
    cloud: Cloud, artefact: Artefact, limits: Limits, before: Before = nothing_before
) -> Callable[[Sequence[HistoryItem], ShiftTensors], tuple[float, int, ShiftTensors]]:
    """Loss, tokens and gradient of a batch by ComputeGradient, in as many calls as the cloud's limit needs.

    Raises ExamplesRefused.
    """
    task = artefact.task

    def once(items: Sequence[HistoryItem], tensors: ShiftTensors) -> tuple[float, int, ShiftTensors]:
        pairs = [pair_of(task, item, before=before(item)) for item in items]
        loss, tokens, gradient = cloud.compute_gradient(pairs, artefact, tensors)
        if tokens < 1:
            raise PerfitError("the cloud computed a gradient over no tokens; tell its operator")
        return loss, tokens, gradient

    def gradient(items: Sequence[HistoryItem], tensors: ShiftTensors) -> tuple[float, int, ShiftTensors]:
        chunks = _chunks(task, items, limits.examples, limits.call_tokens, before)
        parts = [_call_or_name_refused(partial(once, tensors=tensors), chunk) for chunk in chunks]
        return parts[0] if len(parts) == 1 else _merge_batches(parts)

    return gradient


def _call_or_name_refused(call: Callable[[Sequence[HistoryItem]], _T], items: Sequence[HistoryItem]) -> _T:
    """`call(items)`. Raises ExamplesRefused with those that the cloud refuses."""
    try:
        return call(items)
    except InvalidPrompt as error:
        one_by_one = [_each(lambda chunk: [call(chunk)], [item])[0] for item in items]
        _check_refused(items, one_by_one)
        raise error


def _check_refused(items: Sequence[HistoryItem], values: Sequence[object]) -> None:
    """Raises ExamplesRefused where a value is the cloud's refusal of its item."""
    refused = [(i, why) for i, why in zip(items, values, strict=True) if isinstance(why, InvalidPrompt)]
    if refused:
        raise refusal([item for item, _ in refused], refused[0][1])


def refusal(items: Sequence[HistoryItem], reason: InvalidPrompt) -> ExamplesRefused:
    """The error that names these examples."""
    shown = " ".join(item.short for item in items[:_NAMED])
    return ExamplesRefused(
        f"the cloud refuses example {items[0].short} ({reason}); "
        f"`perfit history forget {shown}` takes it out",
        [item.name for item in items],
    )


def _merge_batches(parts: Sequence[tuple[float, int, ShiftTensors]]) -> tuple[float, int, ShiftTensors]:
    """One batch from its parts; every part weighs as much as it has tokens."""
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
