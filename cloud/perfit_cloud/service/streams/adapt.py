"""Adapt: one update over one stream, its examples sent once."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from perfit_cloud.engine.gradients.scheduler import GradientScheduler
from perfit_cloud.engine.gradients.session import GradientRequest
from perfit_cloud.service.codec import decode_step, encode_step, find_version
from perfit_cloud.service.drain import stopping
from perfit_cloud.service.interceptor import Call
from perfit_cloud.service.limits import UPDATE_TOKEN_BYTES, Budget, ConcurrencyLimit
from perfit_cloud.service.settings import ModelSettings
from perfit_cloud.service.waiting import CallWait
from perfit_shared.errors import InvalidInput, TooSlow
from perfit_shared.wire import personalization_pb2 as pb

__all__ = ["Adapting"]

_ROOM_SECONDS = 10.0  # that an update may wait for others to be read
_IDLE_SECONDS = 120.0  # without a message, after which the stream ends


class Adapting:
    def __init__(
        self, model: ModelSettings, *, scheduler: GradientScheduler, streams: ConcurrencyLimit, room: Budget
    ) -> None:
        """`room`: bytes of the tokens of all updates."""
        self._model = model
        self._catalog = model.catalog
        self._scheduler = scheduler
        self._streams = streams
        self._room = room

    def steps(self, requests: Iterator[pb.AdaptRequest], call: Call) -> Iterator[pb.AdaptResponse]:
        """Answers to the steps, one after the other, until the caller wants no more.

        Raises InvalidInput and its kin on what a message should not hold, NotFound, ShiftMismatch,
        Busy, TooSlow when nothing comes for long or the stream's time is over, and Unavailable between two
        messages when the cloud stops.
        """
        with (
            self._model.rate_limiter.hold(call.device, "adaptations"),
            self._streams.hold(),
            # Until its tokens are counted, it reserves the most there may be.
            self._room.hold(UPDATE_TOKEN_BYTES * self._catalog.limits.adapt_tokens, _ROOM_SECONDS) as shrink,
            _Stream(requests, call, call.seconds_left(self._model.calls.stream_seconds)) as stream,
            self._model.calls.drain.listening(stream.stop),
        ):
            opening = stream.next("open").open
            artefact = find_version(opening.artefact, opening.version, self._catalog.artefacts)
            pairs = self._model.reader.update(stream.examples())
            tokens = sum(len(prompt) + len(target) for prompt, target in pairs)
            call.payment.take().settle(tokens)
            self._model.calls.telemetry.tokens("example", tokens)
            shrink(UPDATE_TOKEN_BYTES * tokens)
            with self._scheduler.open(pairs, artefact, left=stream.wait.left, owner=call.device) as session:
                del pairs
                while (step := stream.step()) is not None:
                    rows, personal = decode_step(step, artefact.spec, session.examples)
                    found = stream.wait.result(
                        self._scheduler.submit(
                            GradientRequest(session, rows, personal), loss_only=step.loss_only
                        )
                    )
                    yield encode_step(found, step.personal, loss_only=step.loss_only)


class _Stream:
    """The messages of one call, checked for their order; every wait has an end."""

    def __init__(self, requests: Iterator[pb.AdaptRequest], call: Call, seconds: float) -> None:
        self._requests = requests
        self._ahead: pb.AdaptRequest | None = None  # the first step, which ended the examples
        # Reads one message at a time, on demand: gRPC cannot read with a timeout.
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="perfit-adapt")
        # What comes next: the message that was wanted, or an error that ends the stream.
        self._events: queue.SimpleQueue[pb.AdaptRequest | Exception] = queue.SimpleQueue()
        self.wait = CallWait(call, seconds, too_slow="the stream is over its time; open another")

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.wait.leave()
        self._reader.shutdown(wait=False)

    def stop(self) -> None:
        """End the stream where the next message would be read; from any thread."""
        self._events.put(stopping())

    def next(self, *kinds: str | None) -> pb.AdaptRequest:
        """The next message, which should be of one of these kinds; of kind None when there is no more."""
        seconds = min(_IDLE_SECONDS, self.wait.seconds_left)
        self._reader.submit(self._read)
        try:
            message = self._events.get(timeout=seconds)
        except queue.Empty:
            if seconds < _IDLE_SECONDS:
                raise self.wait.over() from None
            raise TooSlow("no message came for long; open another stream with the next step") from None
        if isinstance(message, Exception):
            raise message
        if message.WhichOneof("body") not in kinds:
            raise InvalidInput("a stream should hold one open, then examples, then steps")
        return message

    def _read(self) -> None:
        try:
            self._events.put(next(self._requests, pb.AdaptRequest()))
        except Exception as error:
            self._events.put(error)

    def examples(self) -> Iterator[pb.Example]:
        """Those of all messages up to the first step, one at least."""
        message = self.next("examples")
        while message.HasField("examples"):
            if not message.examples.examples:
                raise InvalidInput("a message of examples should hold some")
            yield from message.examples.examples
            message = self.next("examples", "step")
        self._ahead = message

    def step(self) -> pb.AdaptStep | None:
        """The next one, None when there is no more."""
        message, self._ahead = self._ahead or self.next("step", None), None
        return message.step if message.HasField("step") else None
