"""Operations in threads, beside the event loop: their events as they come, and an end when the app leaves."""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import AsyncIterator, Coroutine
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Generic, TypeVar

from starlette.requests import Request

from perfit_device.cancellation import Cancellation
from perfit_device.openai_api.body import Refused
from perfit_device.operations.operation import Event, Operation, Performer
from perfit_shared.errors import (
    Busy,
    Cancelled,
    InvalidInput,
    Locked,
    NotFound,
    PerfitError,
    ShiftMismatch,
    TooSlow,
    Unavailable,
    VaultError,
)

__all__ = ["Left", "Running", "Work", "refusal_of", "while_there"]

Result = TypeVar("Result")
_Value = TypeVar("_Value")

# (HTTP status, OpenAI's type) by the nearest class above an error's own.
_STATUS: dict[type[BaseException], tuple[int, str]] = {
    InvalidInput: (400, "invalid_request_error"),
    ShiftMismatch: (400, "invalid_request_error"),
    NotFound: (404, "invalid_request_error"),
    Busy: (429, "rate_limit_error"),
    VaultError: (503, "service_unavailable"),  # locked, or held by another process
    Unavailable: (503, "service_unavailable"),
    TooSlow: (504, "service_unavailable"),
    PerfitError: (502, "api_error"),  # the cloud refuses this device, or fails
}
_STOPPED = "perfit serve has stopped; start it again"


class Left(Exception):
    """The app has closed the connection."""


class Running(Generic[Result]):
    """One operation under way. Iterate over its events; `result` holds what it gave once they have ended."""

    def __init__(self, performer: Performer, operation: Operation[Result]) -> None:
        self.result: Result
        self._performer, self._operation = performer, operation
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event | None] = asyncio.Queue()
        self._error: BaseException | None = None
        self._cancellation = Cancellation()
        self._why_left: PerfitError | None = None

    def work(self) -> None:
        """In a thread of its own."""
        try:
            with self._cancellation.scope():
                self.result = self._performer.perform(self._operation, self._emit)
        except KeyboardInterrupt:  # unless we left, whoever holds the profile locks it at once, or stops
            self._error = self._why_left or Locked("the profile was locked")
        except BaseException as error:
            self._error = error
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._events.put_nowait, None)

    def _emit(self, event: Event) -> None:
        """Raises KeyboardInterrupt when nobody waits for the rest, which cancels the answer at the cloud."""
        self._cancellation.check()
        self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    def leave(self, why: PerfitError | None = None) -> None:
        """The rest is not wanted; `why` is for those who wait for it all the same."""
        self._why_left = why or Cancelled("the answer was broken off")
        self._cancellation.cancel()

    async def __aiter__(self) -> AsyncIterator[Event]:
        try:
            while (event := await self._events.get()) is not None:
                yield event
        finally:
            self.leave()
        if self._error is not None:
            raise self._error


class Work:
    """Has a performer do operations, at most `threads` at once."""

    def __init__(self, performer: Performer, threads: int) -> None:
        self._performer = performer
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="perfit-endpoint")
        self._running: set[Running[Any]] = set()

    def start(self, operation: Operation[Result]) -> Running[Result]:
        """Raises Unavailable once it is closed."""
        running = Running(self._performer, operation)
        self._running.add(running)
        try:
            done = self._pool.submit(running.work)
        except RuntimeError:
            raise Unavailable(_STOPPED) from None
        done.add_done_callback(lambda _: self._running.discard(running))
        return running

    async def perform(self, operation: Operation[Result]) -> Result:
        """The result alone."""
        running = self.start(operation)
        async for _ in running:
            pass
        return running.result

    def close(self) -> None:
        """Ends what is under way, and starts nothing any more."""
        self._pool.shutdown(wait=False)
        for running in list(self._running):
            running.leave(Unavailable(_STOPPED))  # what waits for a thread ends in it, at once


async def while_there(request: Request, work: Coroutine[Any, Any, _Value]) -> _Value:
    """What the work gives. Raises Left, and cancels the work, when the app closes the connection first."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, leaving = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({task, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Left
        return task.result()
    finally:
        for one in (task, leaving):
            one.cancel()
        await asyncio.gather(task, leaving, return_exceptions=True)


def refusal_of(error: BaseException) -> Refused:
    """What an app gets of an error; of a fault inside perfit only where it is."""
    if isinstance(error, Refused):
        return error
    if not isinstance(error, PerfitError):
        frame = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{type(error).__name__} at {Path(frame.filename).name}:{frame.lineno}"
        message = f"a fault inside perfit ({place}); please report it"
        return Refused(message, status=500, kind="server_error", code="internal")
    status, kind = next(_STATUS[cls] for cls in type(error).__mro__ if cls in _STATUS)
    code = "model_not_found" if type(error) is NotFound else error.code
    headers = {}
    if isinstance(error, Busy | Unavailable):
        headers["Retry-After"] = str(max(1, -(-error.retry_ms // 1000)))
    message = "locked: perfit unlock" if isinstance(error, Locked) else str(error)
    return Refused(message, status=status, kind=kind, code=code, headers=headers)
