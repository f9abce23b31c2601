"""Gradients and losses of one update: over one Adapt stream, and call by call where there is none."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any, Self, TypeVar

from perfit_device.cancellation import waiting
from perfit_device.cloud.client import Cloud
from perfit_device.cloud.codec import (
    Artefact,
    Limits,
    Prompt,
    ShiftUse,
    adapt_examples_to_wire,
    adapt_open_to_wire,
    adapt_step_to_wire,
    scores_from_wire,
    tensors_from_wire,
)
from perfit_device.cloud.retry import TRANSIENT
from perfit_device.evaluation import Before, TaskClient, gradient_of, nothing_before, pair_of, refusal
from perfit_device.history import HistoryItem, Split
from perfit_shared.errors import Cancelled, CertificateExpired, InvalidPrompt, PerfitError
from perfit_shared.shifts import ShiftTensors, gradient_from_bytes
from perfit_shared.types import Score

__all__ = ["GradientSource"]

_T = TypeVar("_T")
_STREAM_SECONDS = 86400.0  # clouds end it earlier
_FIRST_SECONDS = 1800.0  # timeout of the first response; no other stream is tried after it
_STEP_SECONDS = 300.0  # timeout of every other response
_MESSAGE_BYTES = 1 << 20  # of examples; the cloud's limit may be lower
_RETRYABLE = (*TRANSIENT, Cancelled, CertificateExpired)  # after which another stream is worth a try


class GradientSource:
    """Gradients and losses for an `Update`, from a cloud. Use `with`.

    Without a stream, or after one breaks, it goes on call by call. When an epoch is judged it tries
    another stream, unless the cloud refused this one for good or took too long to open it: the cloud
    works through all examples before its first response, and would repeat that.
    """

    def __init__(
        self, cloud: Cloud, artefact: Artefact, limits: Limits, split: Split, before: Before = nothing_before
    ) -> None:
        self._cloud, self._artefact, self._limits = cloud, artefact, limits
        self._split, self._before = split, before
        self._client = TaskClient(cloud, artefact.task, limits, before=before)
        self._gradient_of = gradient_of(cloud, artefact, limits, before)
        self._stream: _AdaptStream | None = None
        self._stream_allowed = len(split.train) + len(split.gate) <= limits.adapt_examples
        self._may_open = self._stream_allowed

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def gradient(
        self, rows: Sequence[int], tensors: ShiftTensors
    ) -> Callable[[], tuple[float, int, ShiftTensors]]:
        """Request (nats a token, target tokens, d loss / d tensors) of rows of the examples.

        Those of the gate come behind those that train. The result waits for the answer; called again
        after an error, it repeats the request.
        """
        alone = partial(self._gradient_of, self._items(rows), tensors)
        return self._ask(rows, tensors, self._decoded, alone)

    def scores(self, rows: Sequence[int], tensors: ShiftTensors) -> Callable[[], list[Score]]:
        """Request the score of each of these rows. As `gradient`."""
        self._may_open = self._stream_allowed
        alone = partial(
            self._client.all_scores, self._items(rows), ShiftUse(self._artefact, tensors), cut=True
        )

        def decoded(response: Any) -> list[Score]:
            """Clouds of before send no scores along a stream."""
            return scores_from_wire(response, len(rows)) if response.scores else alone()

        return self._ask(rows, tensors, decoded, alone, loss_only=True)

    def _items(self, rows: Sequence[int]) -> list[HistoryItem]:
        items = [*self._split.train, *self._split.gate]
        return [items[row] for row in rows]

    def _ask(
        self,
        rows: Sequence[int],
        tensors: ShiftTensors,
        decode: Callable[[Any], _T],
        alone: Callable[[], _T],
        *,
        loss_only: bool = False,
    ) -> Callable[[], _T]:
        if self._stream is None and self._may_open:
            task, items = self._artefact.task, itertools.chain(self._split.train, self._split.gate)
            pairs = (pair_of(task, item, before=self._before(item)) for item in items)
            self._stream = _AdaptStream(self._cloud, self._artefact, self._limits, pairs)
        open_stream = self._stream
        if open_stream is not None:
            open_stream.send(adapt_step_to_wire(tensors, rows, loss_only=loss_only))

        def answer() -> _T:
            nonlocal open_stream
            stream, open_stream = open_stream, None
            if stream is not None:
                try:
                    return decode(stream.receive())
                except PerfitError as error:
                    self._stream_allowed = isinstance(error, _RETRYABLE) and not stream.opens_too_slowly
                    self._close()
                    if isinstance(error, InvalidPrompt):
                        self._raise_refused(error)
            return alone()

        return answer

    def _raise_refused(self, reason: InvalidPrompt) -> None:
        """Raises ExamplesRefused before they cost a step: the stream takes all examples or none."""
        refused = self._client.refused_among([*self._split.train, *self._split.gate])
        if refused:
            raise refusal(refused, reason) from reason

    def _decoded(self, response: Any) -> tuple[float, int, ShiftTensors]:
        if response.tokens < 1:
            raise PerfitError("the cloud computed a gradient over no tokens; tell its operator")
        gradient = tensors_from_wire(gradient_from_bytes, response.gradient, self._artefact, "a gradient")
        return response.loss, response.tokens, gradient

    def _close(self) -> None:
        self._may_open = False
        if self._stream is not None:
            self._stream.close()
            self._stream = None


class _AdaptStream:
    """One Adapt call. Opening it sends the examples, gate's behind training's."""

    def __init__(
        self, cloud: Cloud, artefact: Artefact, limits: Limits, pairs: Iterable[tuple[Prompt, str]]
    ) -> None:
        self._artefact, self._pairs = artefact, pairs
        self._message_bytes = min(_MESSAGE_BYTES, limits.message_bytes // 2)
        self._steps: SimpleQueue[Any] = SimpleQueue()  # None: no more
        self._has_answered = False
        self.opens_too_slowly = False
        self._responses = cloud.stream("Adapt", self._messages(), _STREAM_SECONDS)
        self._received: SimpleQueue[Any] = SimpleQueue()  # responses, and an error behind the last
        threading.Thread(target=self._read, name="perfit-adapt", daemon=True).start()

    def _messages(self) -> Iterator[Any]:
        yield adapt_open_to_wire(self._artefact)
        yield from adapt_examples_to_wire(self._pairs, self._message_bytes)
        yield from iter(self._steps.get, None)

    def send(self, step: Any) -> None:
        self._steps.put(step)

    def receive(self) -> Any:
        """The response to the next step that was sent. Raises PerfitError."""
        try:
            with waiting(self._responses.close):
                response = self._received.get(timeout=_STEP_SECONDS if self._has_answered else _FIRST_SECONDS)
        except Empty:
            self.opens_too_slowly = not self._has_answered
            self._responses.close()
            response = self._received.get()  # the error that the closed call ends in
        if isinstance(response, Exception):
            self._received.put(response)  # for the steps that were sent behind it
            raise response
        self._has_answered = True
        return response

    def _read(self) -> None:
        """Runs in its own thread, since gRPC cannot wait with a timeout."""
        try:
            for response in self._responses:
                self._received.put(response)
            self._received.put(Cancelled("the cloud ended the stream"))
        except Exception as error:
            self._received.put(error)

    def close(self) -> None:
        self._steps.put(None)  # wakes gRPC's thread
        self._responses.close()
