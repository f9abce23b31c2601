"""One pass at a time on the compute device, and a fair share of its time for everybody who waits.

Passes that run side by side only take cores from each other. Answers run as short passes. A long pass (a
gradient of many examples) yields between two blocks to whoever waits. While answers and gradients both wait,
each side gets half of the time: an answer waits for one block of a gradient at most. Long passes run one
after another; the next one belongs to the device that had the least time.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from perfit_cloud.engine.fairness import FairShare
from perfit_cloud.engine.interface import EngineHealth
from perfit_cloud.model.blocks import block_list, hidden_of

__all__ = ["DeviceLock", "yield_between_blocks"]

_NOBODY: Mapping[str, float] = {"": 1.0}
_CHECK_SECONDS = 0.2  # between two checks whether a waiter still wants the lock


@dataclass(eq=False)
class _Waiter:
    is_long: bool
    owners: Mapping[str, float]  # by owner, its part of the pass
    go: threading.Event = field(default_factory=threading.Event)


class _Queue:
    """A lock that passes from its holder to one waiter. Not reentrant."""

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
        except BaseException:  # Ctrl-C while waiting, for one: pass the lock on if it has just arrived
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
        """Give the lock to one waiter directly, so that no newcomer takes it first; called under `_lock`."""
        after = self._next()
        self._waiting.remove(after)
        after.go.set()

    def _next(self) -> _Waiter:
        """The waiter who is next; called under `_lock`."""
        return self._waiting[0]


class _LongPasses(_Queue):
    """The queue of long passes. The owner who had the least time goes first."""

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


class DeviceLock(_Queue):
    """A lock that its holder can lend out. Thread-safe; not reentrant."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._long = _LongPasses()
        self._clock = clock
        # Called after every pass with its kind and its seconds, lent time included.
        self.on_pass: Callable[[str, float], None] = lambda _kind, _seconds: None
        # Called at the end of every pass, in the thread that made it.
        self.before_release: Callable[[], object] = lambda: None
        self.moved = clock()  # when the lock last changed hands
        # The holder's kind, when its pass began, and when it last got the lock.
        self._kind, self._begun, self._since = "", 0.0, 0.0
        self._long_seconds = 0.0  # that the current long pass held the lock
        self._lead = 0.0  # seconds by which long passes are ahead, counted while both sides wait

    def health(self) -> EngineHealth:
        """Stalled since the holder last released the lock or yielded."""
        is_taken, waiting = self._is_taken, len(self._waiting) + len(self._long._waiting)
        return EngineHealth(
            int(is_taken), waiting, self._clock() - self.moved if is_taken else 0.0, is_alive=True
        )

    @contextmanager
    def hold(self, kind: str = "answers") -> Iterator[None]:
        """Hold the lock for short passes; call `yield_to_waiting` between two. First come, first served."""
        with self._held(_Waiter(False, _NOBODY), kind):
            yield

    @contextmanager
    def hold_long(
        self, owners: Mapping[str, float] = _NOBODY, check: Callable[[], None] | None = None
    ) -> Iterator[None]:
        """Hold the lock for a pass that yields between blocks; `owners` says how much of it is whose.

        Long passes never overlap: all backward passes of a CUDA device run in one thread of torch's, so one
        inside another could wait for ever. `check` is called now and then while this waits, and once before
        the pass begins; what it raises ends the wait.
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
        # Update the time first, or a health check could see a stale one.
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
        """Called by the holder, from any of its threads: let the side that had less time go first.

        This ends one short pass and begins the next.
        """
        kind = self._kind
        mine = _Waiter(kind == "long", _NOBODY)
        if kind != "long":
            self.before_release()
        with self._lock:
            self._account()
            if kind != "long":
                self.on_pass(kind, self.moved - self._begun)
            self._waiting.append(mine)  # behind all others
            self._hand_over()
        self._wait(mine)
        self._kind = kind
        self._since = self.moved = self._clock()
        if kind != "long":
            self._begun = self._since

    def _account(self) -> None:
        """Add up the holder's time; called under `_lock`."""
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
        """The first waiter of the side that had less time; called under `_lock`."""
        long_had_less = self._lead < 0 if self._kind == "long" else self._lead <= 0
        return next((w for w in self._waiting if w.is_long == long_had_less), self._waiting[0])


def yield_between_blocks(model: Any, device_lock: DeviceLock) -> list[Any]:
    """Make every pass of this model yield behind each block, forward and backward.

    Only holders of the lock may run the model. Returns handles; their remove() ends it.
    """

    def back(_gradient: Any) -> None:
        device_lock.yield_to_waiting()

    def yield_to_waiting(_module: Any, _args: Any, output: Any) -> None:
        device_lock.yield_to_waiting()
        hidden = hidden_of(output)
        if hidden.requires_grad:
            hidden.register_hook(back)  # type: ignore[no-untyped-call]

    return [block.register_forward_hook(yield_to_waiting) for block in block_list(model)]
