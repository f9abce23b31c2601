"""Ask: several answers over one stream, the shift sent once.

One thread of the stream reads its questions, and one for each question waits for the engine. The call's own
thread sends what they have. A question holds its slot until its whole answer is sent, so a caller who reads
slowly holds up nobody else, and few messages wait for it.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

from perfit_cloud.engine.interface import ShiftUse
from perfit_cloud.model.artefacts import Artefact
from perfit_cloud.service.calls import Answers
from perfit_cloud.service.catalog import Catalog
from perfit_cloud.service.codec import decode_shift, encode_chunk
from perfit_cloud.service.drain import Drain, stopping
from perfit_cloud.service.interceptor import Call, public_error
from perfit_cloud.service.limits import Paid
from perfit_shared.errors import Busy, Cancelled, InvalidInput, TooSlow
from perfit_shared.wire import personalization_pb2 as pb

__all__ = ["Asking"]

_IDLE_SECONDS = 120.0  # without a question, after which the stream ends


class Asking:
    def __init__(self, catalog: Catalog, answers: Answers, *, drain: Drain, stream_seconds: float) -> None:
        self._catalog = catalog
        self._answers = answers
        self._drain = drain
        self._stream_seconds = stream_seconds

    def answers(self, requests: Iterator[pb.AskRequest], call: Call) -> Iterator[pb.AskResponse]:
        """Parts of the answers as they are made, until every question is answered.

        Raises InvalidInput and what `decode_shift` raises on messages out of order, TooSlow at the end
        of the stream's time, Busy when more questions were refused than a device may make calls, and
        Unavailable when the cloud stops and what was asked before is answered.
        """
        stream = _Stream(self._answers, call, slots=self._catalog.limits.questions)
        try:
            stream.start(requests, self._catalog.artefacts)
            # Called when the RPC ends, however it does: the caller left, or its deadline passed.
            if not call.add_callback(stream.close):
                raise Cancelled("the caller left")
            with self._drain.listening(stream.stop):
                yield from stream.responses(self._stream_seconds)
        finally:
            stream.close()


class _Stream:
    """The state of one Ask call."""

    def __init__(self, answers: Answers, call: Call, *, slots: int) -> None:
        self._answers = answers
        self._device = call.device
        self._payment = call.payment
        self._slots = threading.Semaphore(slots)
        self._pool = ThreadPoolExecutor(slots + 1, thread_name_prefix="perfit-ask")
        # What to send; None when no more questions are taken; an error ends the stream.
        self._events: queue.SimpleQueue[pb.AskResponse | Exception | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._waiting: dict[int, Callable[[], None] | None] = {}  # number → how to cancel its answer
        self._is_closed = False
        self._is_asked = False  # whether the caller has no more questions
        self._is_stopping = False  # whether questions are turned away, since the cloud stops

    def start(self, requests: Iterator[pb.AskRequest], artefacts: Mapping[str, Artefact]) -> None:
        self._pool.submit(self._read, requests, artefacts)

    def stop(self) -> None:
        """Take no more questions, and end when those under way are answered. From any thread."""
        self._is_stopping = True
        self._events.put(None)

    def close(self) -> None:
        """End every answer at once and let go of every thread."""
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
            cancels = [cancel for cancel in self._waiting.values() if cancel is not None]
        for cancel in cancels:
            cancel()
        self._events.put(Cancelled("the caller left"))
        self._slots.release()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def responses(self, seconds: float) -> Iterator[pb.AskResponse]:
        end, is_asked = time.monotonic() + seconds, False
        while not is_asked or self._waiting:
            left = end - time.monotonic()
            if left <= 0:
                raise TooSlow("the stream is over its time; open another")
            try:
                event = self._events.get(timeout=min(left, _IDLE_SECONDS))
            except queue.Empty:
                if left > _IDLE_SECONDS and not self._waiting:
                    raise TooSlow("no question came for long; open another stream with the next") from None
                continue
            if isinstance(event, Exception):
                raise event
            if event is None:
                is_asked = True
                continue
            is_last = bool(event.failure.code or event.part.finish)
            if is_last:  # the number is free before the caller hears the end
                with self._lock:
                    del self._waiting[event.number]
            yield event
            if is_last:
                self._slots.release()
        if self._is_stopping and not self._is_asked:
            raise stopping()

    # -- in the threads of the stream ----------------------------------------------------------

    def _read(self, requests: Iterator[pb.AskRequest], artefacts: Mapping[str, Artefact]) -> None:
        try:
            first = next(requests, pb.AskRequest())
            if first.WhichOneof("body") != "shift":
                raise InvalidInput("the first message of the stream should hold the shift")
            shift = decode_shift(first.shift, artefacts)
            while self._slots.acquire():
                request = next(requests, None)
                if request is None:
                    break
                if request.WhichOneof("body") != "question":
                    raise InvalidInput("every message after the first should hold a question")
                self._take(request.question, shift)
            self._is_asked = True
            self._events.put(None)
        except Exception as error:
            self._events.put(error)

    def _take(self, question: pb.Question, shift: ShiftUse) -> None:
        with self._lock:
            if self._is_closed:
                raise Cancelled("the caller left")
            if question.number in self._waiting:
                raise InvalidInput("a question has the number of one that still waits for its answer")
            self._waiting[question.number] = None
            self._pool.submit(self._answer, question, shift, self._payment.take())

    def _answer(self, question: pb.Question, shift: ShiftUse, paid: Paid) -> None:
        def at_end(cancel: Callable[[], None]) -> bool:
            with self._lock:
                self._waiting[question.number] = cancel
                return not self._is_closed

        try:
            if self._is_stopping:
                raise stopping()
            for chunk in self._answers.chunks(question, shift, self._device, at_end, paid=paid):
                self._events.put(pb.AskResponse(number=question.number, part=encode_chunk(chunk)))
        except Exception as error:
            _, code, message, retry_ms = public_error(error, "Ask")
            failure = pb.Failure(code=code, message=message, retry_ms=retry_ms)
            self._events.put(pb.AskResponse(number=question.number, failure=failure))
            try:
                self._answers.refused(self._device)
            except Busy as over:  # else refused questions would be free and unlimited
                self._events.put(over)
