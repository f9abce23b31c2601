"""What the RPCs share: engines for gradients as they see them, and how a call ends."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Protocol, Self

from perfit_cloud.engine.gradients.batch import Pair
from perfit_cloud.engine.interface import Engine, Gradient, ShiftUse
from perfit_cloud.service.codec import PromptReader, decode_sampling
from perfit_cloud.service.limits import ConcurrencyLimit, Limits, Paid, RateLimiter
from perfit_cloud.service.telemetry import Telemetry
from perfit_shared.errors import Cancelled, TooSlow, Unavailable
from perfit_shared.types import Chunk, Score
from perfit_shared.wire import personalization_pb2 as pb

__all__ = ["Answers", "Gradients"]


class Gradients(Protocol):
    """`check` is called before each pass and now and then in line; what it raises ends the work."""

    def score(
        self, candidates: list[Pair], shift: ShiftUse, owner: str, check: Callable[[], None], /
    ) -> list[Score]: ...
    def gradient(
        self, examples: list[Pair], shift: ShiftUse, owner: str, check: Callable[[], None], /
    ) -> Gradient: ...


class Answers:
    """The answers of Generate and of Ask: no more at once than there are places, none without end."""

    def __init__(
        self,
        generation: Engine,
        reader: PromptReader,
        limits: Limits,
        *,
        places: ConcurrencyLimit,
        rate_limiter: RateLimiter,
        telemetry: Telemetry,
        seconds: float,
    ) -> None:
        self._generation = generation
        self._reader = reader
        self._limits = limits
        self._places = places
        self._rate_limiter = rate_limiter
        self._telemetry = telemetry
        self._seconds = seconds

    def refused(self, device: str) -> None:
        """A question that came to nothing costs as much as a call. Raises Busy."""
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
        """The chunks of one answer; what it asks for is checked when it has a place, and paid for.

        `paid`: for its message already, most of which is given back when there is no room. `at_end(cancel)`
        keeps `cancel` for when the caller leaves, and says false when it has left.
        Its place is free when it is over or cancelled, whether or not anybody reads on.
        """
        last = None
        with (
            paid.refunded(),
            _Held(self._rate_limiter.hold(device, "answers"), self._places.place()) as held,
        ):
            prompt = self._reader.prompt(request.prompt)
            sampling = decode_sampling(request.sampling, prompt_tokens=len(prompt), limits=self._limits)
            most = sampling.max_new_tokens
            paid.settle(len(prompt) + most)
            self._telemetry.tokens("prompt", len(prompt))
            answer = self._generation.submit(prompt, shift, sampling, device)

            def cancel() -> None:
                answer.cancel()
                held.release()

            with _after(self._seconds, cancel) as late:
                if not at_end(cancel):
                    raise Cancelled("the caller left")
                for chunk in answer:
                    if chunk.finish is not None:
                        last = chunk
                        paid.settle(len(prompt) + chunk.answer_tokens)
                        self._telemetry.tokens("answer", chunk.answer_tokens)
                        break
                    yield chunk
        if last is not None:
            yield last  # who hears that it is over finds the place free
        elif late.is_set():
            raise TooSlow("the answer took longer than this cloud allows")
        else:
            raise Unavailable("the cloud is stopping; try again later")


class _Held:
    """Places that are given back once, by whichever thread comes first."""

    def __init__(self, *places: AbstractContextManager[None]) -> None:
        self._lock = threading.Lock()
        with ExitStack() as stack:
            for place in places:
                stack.enter_context(place)
            self._places = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        with self._lock:
            self._places.close()


@contextmanager
def _after(seconds: float, cancel: Callable[[], None]) -> Iterator[threading.Event]:
    """Cancel on leaving, or after `seconds`, which sets the event.

    A timer, because the call may stand in the answer's `next` for a chunk that never comes.
    """
    late = threading.Event()

    def expire() -> None:
        late.set()
        cancel()

    timer = threading.Timer(seconds, expire)
    timer.daemon = True
    timer.start()
    try:
        yield late
    finally:
        timer.cancel()
        cancel()
