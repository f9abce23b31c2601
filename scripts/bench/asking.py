"""Asking engines of ours many things at once, and when the answers came."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from threading import Thread

from workload import Asked

from perfit_cloud.engine.device_lock import DeviceLock
from perfit_cloud.engine.generation.stream import TextStream
from perfit_cloud.engine.interface import Engine

__all__ = ["Run", "ask_all", "ask_in_step"]


@dataclass(frozen=True)
class Run:
    seconds: float  # from the first submit to the last token
    first: list[float]  # by request, seconds from its submit to its first piece
    answers: list[list[int]]  # token ids

    @property
    def tokens_per_second(self) -> float:
        """Of new tokens."""
        return sum(map(len, self.answers)) / self.seconds


def ask_all(engine: Engine, asked: Sequence[Asked]) -> Run:
    """Everything at once. Raises RuntimeError unless every answer has all tokens it may have."""
    return _Asking(engine, asked, time.perf_counter).run()


def ask_in_step(sides: Mapping[str, tuple[Engine, Sequence[Asked]]]) -> dict[str, Run]:
    """Each engine (all different) gets its requests, and one pass of each goes after one of the others'.

    Seconds are of a clock of its own for each side, which stands still while other sides have their
    pass. So whatever slows the machine for longer than a pass slows all sides alike, where sides that
    run one after another would need the machine to stay as it is for minutes.
    """
    device_lock = DeviceLock()
    with ExitStack() as stack:
        with device_lock.hold():  # nobody begins before everybody has all requests
            begun = {
                name: _Asking(engine, asked, stack.enter_context(_Clocked(engine, device_lock)))
                for name, (engine, asked) in sides.items()
            }
        return {name: asking.run() for name, asking in begun.items()}


class _Asking:
    """Requests on their way.

    A thread waits for each first piece and ends with it; the rest is read one answer after another,
    since pieces queue up, so that the reading takes next to nothing from the engine.
    """

    def __init__(self, engine: Engine, asked: Sequence[Asked], clock: Callable[[], float]) -> None:
        self._asked, self._clock = asked, clock
        self._first = [0.0] * len(asked)
        self._begun = clock()
        self._last = self._begun
        self._answers, self._threads = [], []
        for number, request in enumerate(asked):
            since = clock()
            self._answers.append(engine.submit(*request))
            self._threads.append(Thread(target=self._wait, args=(number, self._answers[-1], since)))
            self._threads[-1].start()
        self._reader = Thread(target=self._read)
        self._reader.start()

    def _wait(self, number: int, answer: TextStream, since: float) -> None:
        next(answer)
        self._first[number] = self._clock() - since

    def _read(self) -> None:
        for thread in self._threads:
            thread.join()
        for answer in self._answers:
            for _ in answer:
                pass
        self._last = self._clock()

    def run(self) -> Run:
        """When all is there. Raises RuntimeError as `ask_all` does."""
        self._reader.join()
        run = Run(self._last - self._begun, self._first, [answer.ids for answer in self._answers])
        if [len(ids) for ids in run.answers] != [sampling.max_new_tokens for _, _, sampling in self._asked]:
            raise RuntimeError("an answer is shorter than asked for: the model's end of sequence is on")
        return run


class _Clocked:
    """Within the block an engine has its passes in turn with others, and the clock counts its own alone."""

    def __init__(self, engine: Engine, device_lock: DeviceLock) -> None:
        self._engine, self._device_lock = engine, device_lock
        self._round = engine._round
        self._seconds = 0.0
        self._since: float | None = None  # while a pass runs

    def __enter__(self) -> _Clocked:
        self._engine._round = self._in_turn  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        self._engine._round = self._round  # type: ignore[method-assign]

    def __call__(self) -> float:
        since = self._since
        return self._seconds + (0.0 if since is None else time.perf_counter() - since)

    def _in_turn(self) -> None:
        with self._device_lock.hold():
            self._since = time.perf_counter()
            try:
                self._round()
            finally:
                seconds, self._since = time.perf_counter() - self._since, None
                self._seconds += seconds
