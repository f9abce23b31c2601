"""What the RPCs share: the engines as they see them, and how a call ends."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import grpc

from perfit_cloud.engine.types import Gradient, Piece, Sampling, Score, ShiftUse
from perfit_shared.errors import Cancelled

__all__ = ["Answer", "Generation", "Gradients", "cancelled_after", "check_active"]


class Answer(Protocol):
    """An answer as it is made: blocks in `next`; `cancel` frees its place at once, from any thread."""

    def __iter__(self) -> Iterator[Piece]: ...
    def cancel(self) -> None: ...


class Generation(Protocol):
    def submit(self, prompt: list[int], shift: ShiftUse, sampling: Sampling, /) -> Answer: ...


class Gradients(Protocol):
    def score(self, candidates: list[tuple[list[int], list[int]]], shift: ShiftUse, /) -> list[Score]: ...
    def gradient(self, examples: list[tuple[list[int], list[int]]], shift: ShiftUse, /) -> Gradient: ...


@contextmanager
def cancelled_after(seconds: float, answer: Answer) -> Iterator[threading.Event]:
    """Cancel the answer on leaving, or after `seconds`, which sets the event.

    A timer, because the call may stand in the answer's `next` for a piece that never comes.
    """
    late = threading.Event()

    def expire() -> None:
        late.set()
        answer.cancel()

    timer = threading.Timer(seconds, expire)
    timer.daemon = True
    timer.start()
    try:
        yield late
    finally:
        timer.cancel()
        answer.cancel()


def check_active(context: grpc.ServicerContext) -> None:
    if not context.is_active():
        raise Cancelled("the caller left")
