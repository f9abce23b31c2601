"""One pass at a time on the model's device, whose time is shared evenly by those who want it.

Passes that ran side by side would only take cores from each other. Answers come in short passes, one
after another; a long pass (a gradient of many examples) breathes between blocks. While both want the
device each side gets as much time as the other: answers wait for one block of a gradient at most, and
are half as fast at worst, and so are gradients. Long passes come one after another, whole, and the next
is of the device that had least time.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from perfit_cloud.engine.fairness import FairShare
from perfit_cloud.engine.interface import Vital
from perfit_cloud.model.blocks import block_list, hidden_of

__all__ = ["DeviceLock", "yield_between_blocks"]

_NOBODY: Mapping[str, float] = {"": 1.0}
_CHECK_SECONDS = 0.2  # between two looks whether a waiter still wants its turn


@dataclass(eq=False)
class _Waiter:
    is_long: bool
    owners: Mapping[str, float]  # whose pass it is, and how much of it
    go: threading.Event = field(default_factory=threading.Event)


class _Line:
    """A lock that is handed to one of those who wait. Not reentrant."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: list[_Waiter] = []  # in the order they came
        self._is_taken = False

    def _acquire(self, mine: _Waiter, check: Callable[[], None] | None = None) -> None:
        with self._lock:
            if not self._is_taken:
                self._is_taken = True
                return
            self._waiting.append(mine)
        self._wait(mine, check)

    def _wait(self, mine: _Waiter, check: Callable[[], None] | None = None) -> None:
        try:
            while not mine.go.wait(None if check is None else _CHECK_SECONDS):
                if check is not None:
                    check()
        except BaseException:  # or Ctrl-C while waiting: the turn must not be handed to nobody
            with self._lock:
                if mine in self._waiting:
                    self._waiting.remove(mine)
                    raise
            self._release()
            raise

    def _release(self) -> None:
        with self._lock:
            if self._waiting:
                self._hand_over()
            else:
                self._is_taken = False

    def _hand_over(self) -> None:
        """To one of those who wait, so that nobody can slip in between; called under the lock."""
        after = self._next()
        self._waiting.remove(after)
        after.go.set()

    def _next(self) -> _Waiter:
        """Which of those who wait; called under the lock."""
        return self._waiting[0]


class _LongLine(_Line):
    """The line of long passes. Whoever had the device for the least time goes first."""

    def __init__(self) -> None:
        super().__init__()
        self._share = FairShare()

    @contextmanager
    def hold(
        self, owners: Mapping[str, float], check: Callable[[], None] | None, seconds: Callable[[], float]
    ) -> Iterator[None]:
        """`seconds`: how long the pass had the device, asked when it is over."""
        self._acquire(_Waiter(True, owners), check)
        with self._lock:
            self._note(owners)
        try:
            yield
        finally:
            whole = sum(owners.values())
            with self._lock:
                self._note(owners)
                for owner, part in owners.items():
                    self._share.charge(owner, seconds() * part / whole)
                self._note({})
            self._release()

    def _note(self, owners: Mapping[str, float]) -> None:
        self._share.wanted_by([*owners, *(owner for waiter in self._waiting for owner in waiter.owners)])

    def _next(self) -> _Waiter:
        return min(self._waiting, key=lambda waiter: min(map(self._share.had, waiter.owners)))


class DeviceLock(_Line):
    """A lock that its holder can lend out. Thread-safe; not reentrant."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._long = _LongLine()
        self._clock = clock
        # Told of every pass that is over: its kind and its seconds, what was lent out included.
        self.on_pass: Callable[[str, float], None] = lambda _kind, _seconds: None
        # Called at the end of every pass, in the thread that made it.
        self.before_release: Callable[[], object] = lambda: None
        self.moved = clock()  # when it last changed hands
        # Of the holder: its kind, when its pass began, and when it last got the device.
        self._kind, self._begun, self._since = "", 0.0, 0.0
        self._long_seconds = 0.0  # that the long pass at hand had the device
        self._lead = 0.0  # seconds that long passes had more than others, while both wanted the device

    def health(self) -> Vital:
        """Still for as long as whoever holds the device neither gave it back nor breathed."""
        is_taken, waiting = self._is_taken, len(self._waiting)
        return Vital(int(is_taken), waiting, self._clock() - self.moved if is_taken else 0.0, is_alive=True)

    def long_waiting(self) -> list[str]:
        """Whose long passes wait for the end of the one at hand; a name for each pass."""
        return [owner for waiter in list(self._long._waiting) for owner in waiter.owners]

    @contextmanager
    def hold(self, kind: str = "answers") -> Iterator[None]:
        """Hold it for short passes, with a breath between two; waits for those who asked before."""
        with self._held(_Waiter(False, _NOBODY), kind):
            yield

    @contextmanager
    def hold_long(
        self, owners: Mapping[str, float] = _NOBODY, check: Callable[[], None] | None = None
    ) -> Iterator[None]:
        """Hold the device for a pass that breathes; `owners` says whose it is, in parts of any size.

        `check` is called now and then while it waits, and before it begins; what it raises ends the wait.
        Waits for the end of another such pass, and for those of devices that had less. One of them inside
        another could stand still for ever: all backward passes of a CUDA device run in one thread of torch's.
        """
        with (
            self._long.hold(owners, check, lambda: self._long_seconds),
            self._held(_Waiter(True, owners), "long"),
        ):
            self._long_seconds = 0.0
            if check is not None:
                check()
            yield

    @contextmanager
    def _held(self, mine: _Waiter, kind: str) -> Iterator[None]:
        # Before it is taken, or for a moment it would seem to be held since it was last used.
        if not self._is_taken:
            self.moved = self._clock()
        self._acquire(mine)
        self._kind, self._since = kind, self._clock()
        self._begun = self.moved = self._since
        begun = self._begun
        try:
            yield
        finally:
            self.before_release()
            with self._lock:
                self._account()
            self.on_pass(kind, self.moved - (begun if kind == "long" else self._begun))
            self._release()

    def yield_to_waiting(self) -> None:
        """Called by the holder, from any of its threads: let those go first who had less.

        A short pass is over with it, and the next begins.
        """
        kind = self._kind
        mine = _Waiter(kind == "long", _NOBODY)
        if kind != "long":
            self.before_release()
        with self._lock:
            self._account()
            if kind != "long":
                self.on_pass(kind, self.moved - self._begun)
            self._waiting.append(mine)  # last, so that it is next only if nobody else should be
            self._hand_over()
        self._wait(mine)
        self._kind = kind
        self._since = self.moved = self._clock()
        if kind != "long":
            self._begun = self._since

    def _account(self) -> None:
        """Note what the holder had; called under the lock."""
        now = self._clock()
        seconds, self._since, self.moved = now - self._since, now, now
        is_long = self._kind == "long"
        if is_long:
            self._long_seconds += seconds
        if any(waiter.is_long != is_long for waiter in self._waiting):
            self._lead += seconds if is_long else -seconds
        else:
            self._lead = 0.0

    def _next(self) -> _Waiter:
        """Of the side that had less, the one that came first; called under the lock."""
        long_had_less = self._lead < 0 if self._kind == "long" else self._lead <= 0
        return next((w for w in self._waiting if w.is_long == long_had_less), self._waiting[0])


def yield_between_blocks(model: Any, device_lock: DeviceLock) -> list[Any]:
    """Make every pass of this model breathe behind its blocks, forward and backward.

    The model must be run by holders alone. Returns handles whose remove() ends it.
    """

    def back(_gradient: Any) -> None:
        device_lock.yield_to_waiting()

    def yield_to_waiting(_module: Any, _args: Any, output: Any) -> None:
        device_lock.yield_to_waiting()
        hidden = hidden_of(output)
        if hidden.requires_grad:
            hidden.register_hook(back)  # type: ignore[no-untyped-call]

    return [block.register_forward_hook(yield_to_waiting) for block in block_list(model)]
