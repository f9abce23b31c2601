"""One pass at a time on the model's device, in the order in which they asked.

Passes that ran side by side would only take cores from each other. A long pass (a gradient of many
examples) breathes between blocks: whoever waits goes first, and the pass goes on after one turn of
theirs. So answers wait for one block of a gradient at most, and gradients for one step of the answers.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from perfit_cloud.engine.types import Vital
from perfit_cloud.model.blocks import block_list, hidden_of

__all__ = ["Turns", "breathe_between_blocks"]


class _Line:
    """A fair lock. Not reentrant."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: deque[threading.Event] = deque()
        self._is_taken = False

    @contextmanager
    def take(self) -> Iterator[None]:
        """Hold it; waits for those who asked before."""
        self._acquire()
        try:
            yield
        finally:
            self._release()

    def _acquire(self) -> None:
        with self._lock:
            if not self._is_taken:
                self._is_taken = True
                return
            mine = threading.Event()
            self._waiting.append(mine)
        try:
            mine.wait()
        except BaseException:  # Ctrl-C while waiting: the turn must not be handed to nobody
            with self._lock:
                if mine in self._waiting:
                    self._waiting.remove(mine)
                    raise
            self._release()
            raise

    def _release(self) -> None:
        with self._lock:
            if self._waiting:
                self._waiting.popleft().set()  # handed over: nobody can slip in between
            else:
                self._is_taken = False


class Turns(_Line):
    """A fair lock that its holder can lend out. Thread-safe; not reentrant."""

    def __init__(self) -> None:
        super().__init__()
        self._long = _Line()
        # Told of every turn that is over: its kind and its seconds, those lent out included.
        self.on_pass: Callable[[str, float], None] = lambda _kind, _seconds: None
        # Called at the end of every turn, in the thread that has it.
        self.before_release: Callable[[], object] = lambda: None
        self.moved = time.monotonic()  # when it last changed hands

    def vital(self) -> Vital:
        """Still for as long as whoever holds the device neither gave it back nor breathed."""
        is_taken, waiting = self._is_taken, len(self._waiting)
        return Vital(
            int(is_taken), waiting, time.monotonic() - self.moved if is_taken else 0.0, is_alive=True
        )

    @contextmanager
    def take(self, kind: str = "answers") -> Iterator[None]:
        """Hold it; waits for those who asked before."""
        with self._timed(kind):
            yield

    @contextmanager
    def take_long(self) -> Iterator[None]:
        """Hold the device for a pass that breathes; waits for the end of other such passes first.

        One of them inside another could stand still for ever: all backward passes of a CUDA device
        run in one thread of torch's.
        """
        with self._long.take(), self._timed("long"):
            yield

    @contextmanager
    def _timed(self, kind: str) -> Iterator[None]:
        # Or for a moment, taken and not noted yet, it would seem to be held since it was last used.
        if not self._is_taken:
            self.moved = time.monotonic()
        with super().take():
            begun = self.moved = time.monotonic()
            try:
                yield
            finally:
                self.before_release()
                self.moved = time.monotonic()
                self.on_pass(kind, self.moved - begun)

    def breathe(self) -> None:
        """Called by the holder, from any of its threads: let everyone who waits now go first."""
        self.moved = time.monotonic()
        if self._waiting:
            self._release()
            self._acquire()


def breathe_between_blocks(model: Any, turns: Turns) -> list[Any]:
    """Make every pass of this model breathe behind its blocks, forward and backward.

    The model must be run by holders alone. Returns handles whose remove() ends it.
    """

    def back(_gradient: Any) -> None:
        turns.breathe()

    def breathe(_module: Any, _args: Any, output: Any) -> None:
        turns.breathe()
        hidden = hidden_of(output)
        if hidden.requires_grad:
            hidden.register_hook(back)  # type: ignore[no-untyped-call]

    return [block.register_forward_hook(breathe) for block in block_list(model)]
