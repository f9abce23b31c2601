"""Asking an engine of ours many things at once, and when the answers came."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from threading import Thread

from workload import Asked

from perfit_cloud.engine.answers import Answer
from perfit_cloud.engine.generation import Engine

__all__ = ["Run", "ask_all"]


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
    """Everything at once. Raises RuntimeError unless every answer has all tokens it may have.

    A thread waits for each first piece and ends with it; the rest is read one answer after another,
    since pieces queue up, so that the reading takes next to nothing from the engine.
    """
    first = [0.0] * len(asked)

    def wait(number: int, answer: Answer, since: float) -> None:
        next(answer)
        first[number] = time.perf_counter() - since

    begun = time.perf_counter()
    answers, threads = [], []
    for number, request in enumerate(asked):
        since = time.perf_counter()
        answers.append(engine.submit(*request))
        threads.append(Thread(target=wait, args=(number, answers[-1], since)))
        threads[-1].start()
    for thread in threads:
        thread.join()
    for answer in answers:
        for _ in answer:
            pass
    run = Run(time.perf_counter() - begun, first, [answer.ids for answer in answers])
    if [len(ids) for ids in run.answers] != [sampling.max_new_tokens for _, _, sampling in asked]:
        raise RuntimeError("an answer is shorter than asked for: the model's end of sequence is on")
    return run
