"""Stand-ins for the engines: for the tests of the service."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import grpc

from perfit_cloud.engine.interface import EngineHealth
from perfit_shared.types import Chunk, Finish
from perfit_shared.wire import personalization_pb2 as pb
from perfit_shared.wire import personalization_pb2_grpc as pb_grpc
from tests.support.cloud import BASE, TIMEOUT


class Drip:
    """A generation engine whose answers come piece by piece when a test says so, or never."""

    continuous = True

    def __init__(self) -> None:
        self.go = threading.Semaphore(0)
        self.submitted = threading.Event()
        self.cancelled = threading.Event()

    def submit(self, *_: object) -> Drip:
        self.submitted.set()
        return self

    def cancel(self) -> None:
        self.cancelled.set()
        self.go.release()

    def __iter__(self) -> Iterator[Chunk]:
        while self.go.acquire() and not self.cancelled.is_set():
            yield Chunk("word ")


class Held:
    """An engine whose answers say `piece` each time a test lets them, and end when it wants them to."""

    continuous = True

    def __init__(self, *, piece: str = "word ") -> None:
        self.piece = piece
        self.ends_at_once = False
        self.answers: list[HeldAnswer] = []

    def submit(self, *_: object) -> HeldAnswer:
        answer = HeldAnswer(self.piece)
        self.answers.append(answer)
        if self.ends_at_once:
            answer.finish()
        return answer

    @property
    def running(self) -> int:
        return sum(not answer.is_over for answer in self.answers)


class HeldAnswer:
    def __init__(self, piece: str) -> None:
        self._steps: queue.SimpleQueue[Chunk | None] = queue.SimpleQueue()
        self._piece = piece
        self.is_over = False

    def step(self) -> None:
        self._steps.put(Chunk(self._piece))

    def finish(self) -> None:
        self._steps.put(Chunk("", Finish.END, 3, 2))

    def cancel(self) -> None:
        self.is_over = True
        self._steps.put(None)

    def __iter__(self) -> Iterator[Chunk]:
        while (piece := self._steps.get()) is not None and not self.is_over:
            yield piece


class Slow:
    """A scheduler whose scores take until the test lets them."""

    caches_activations = True

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.entered = threading.Event()
        self.go = threading.Event()

    def open_stateless(self, *_: object, **__: object) -> Any:
        return nullcontext(SimpleNamespace(whole=None))

    def score(self, _: object) -> Future[list[Any]]:
        if self.error is not None:
            raise self.error
        self.entered.set()
        self.go.wait(TIMEOUT)
        found: Future[list[Any]] = Future()
        found.set_result([])
        return found


class Played:
    """Engines that fare as a test says."""

    def __init__(self) -> None:
        self.now = EngineHealth(0, 0, 0.0, is_alive=True)
        self.cache_tokens_held = self.scores_waiting = 0
        self.on_pass: Callable[[str, float], None] = lambda _kind, _seconds: None

    def health(self) -> EngineHealth:
        return self.now

    def bytes_held(self) -> tuple[int, int]:
        return 0, 0


def score() -> pb.ScoreRequest:
    candidate = pb.Candidate(prompt=pb.Prompt(text="the cat"), answer=" zebra")
    return pb.ScoreRequest(candidates=[candidate], shift=BASE)


def describe(channel: grpc.Channel) -> Callable[[], object]:
    return lambda: pb_grpc.PersonalizationStub(channel).Describe(pb.DescribeRequest(), timeout=TIMEOUT)
