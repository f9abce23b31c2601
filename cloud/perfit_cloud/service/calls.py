"""Answers of Generate and Ask: admission, payment, and how an answer ends."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from typing import Self

from perfit_cloud.engine.interface import Engine, ShiftUse
from perfit_cloud.service.codec import PromptReader, decode_sampling
from perfit_cloud.service.deadlines import Deadlines
from perfit_cloud.service.limits import ConcurrencyLimit, Limits, Paid, RateLimiter
from perfit_cloud.service.telemetry import Telemetry
from perfit_shared.errors import Cancelled, TooSlow, Unavailable
from perfit_shared.types import Chunk
from perfit_shared.wire import personalization_pb2 as pb

__all__ = ["Answers"]


class Answers:
    """The answers of Generate and of Ask: a bounded number at once, none without end."""

    def __init__(
        self,
        generation: Engine,
        reader: PromptReader,
        limits: Limits,
        *,
        limit: ConcurrencyLimit,
        rate_limiter: RateLimiter,
        telemetry: Telemetry,
        seconds: float,
    ) -> None:
        self._generation = generation
        self._reader = reader
        self._limits = limits
        self._limit = limit
        self._rate_limiter = rate_limiter
        self._telemetry = telemetry
        self._seconds = seconds
        self._deadlines = Deadlines()

    def refused(self, device: str) -> None:
        """A refused question costs as much as a call. Raises Busy."""
        self._rate_limiter.spend(device, "requests")

    def chunks(
        self,
        request: pb.GenerateRequest | pb.Question,
        shift: ShiftUse,
        device: str,
        at_end: Callable[[Callable[[], None]], bool],
        *,
        paid: Paid,
    ) -> Iterator[Chunk]:
        """The chunks of one answer. The request is checked and paid for once it holds a slot.

        `paid` is what its message cost; most of it is given back when there is no room. `at_end(cancel)`
        registers `cancel` for when the caller leaves, and says false when it has left. The slot is free once
        the answer is over or cancelled, whether or not anybody reads on.
        """
        last, is_late = None, threading.Event()
        with paid.refunded(), _Held(self._rate_limiter.hold(device, "answers"), self._limit.hold()) as held:
            prompt = self._reader.prompt(request.prompt)
            sampling = decode_sampling(request.sampling, prompt_tokens=len(prompt), limits=self._limits)
            most = sampling.max_new_tokens
            paid.settle(len(prompt) + most)
            self._telemetry.tokens("prompt", len(prompt))
            answer = self._generation.submit(prompt, shift, sampling, device)

            def cancel() -> None:
                answer.cancel()
                held.release()

            def expire() -> None:
                is_late.set()
                cancel()

            try:
                # From another thread, because this one may wait in the answer's `next` for ever.
                with self._deadlines.after(self._seconds, expire):
                    if not at_end(cancel):
                        raise Cancelled("the caller left")
                    for chunk in answer:
                        if chunk.finish is not None:
                            last = chunk
                            paid.settle(len(prompt) + chunk.answer_tokens)
                            self._telemetry.tokens("answer", chunk.answer_tokens)
                            break
                        yield chunk
            finally:
                cancel()
        if last is not None:
            yield last  # whoever hears that it is over finds the slot free
        elif is_late.is_set():
            raise TooSlow("the answer took longer than this cloud allows")
        else:
            raise Unavailable("the cloud is stopping; try again later")


class _Held:
    """Slots that are given back once, by whichever thread comes first."""

    def __init__(self, *slots: AbstractContextManager[None]) -> None:
        self._lock = threading.Lock()
        with ExitStack() as stack:
            for slot in slots:
                stack.enter_context(slot)
            self._slots = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        with self._lock:
            self._slots.close()
