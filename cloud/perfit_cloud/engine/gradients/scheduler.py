"""What runs next of all requests for gradients and scores, several in one pass where they can share it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np

from perfit_cloud.engine.errors import error_location
from perfit_cloud.engine.fairness import FairShare
from perfit_cloud.engine.gradients.batch import BatchBudget, Pair
from perfit_cloud.engine.gradients.requests import PassShare, Sum, cut_into_passes
from perfit_cloud.engine.gradients.session import GradientRequest, UpdateEngine, UpdateSession
from perfit_cloud.engine.gradients.stateless import StatelessSession
from perfit_cloud.engine.interface import EngineHealth, Gradient, ShiftUse
from perfit_cloud.model.artefacts import Artefact
from perfit_cloud.model.partial import Indices
from perfit_shared.errors import Busy, PerfitError, Unavailable
from perfit_shared.types import Score

__all__ = ["GradientScheduler"]

_STOPPING = "the cloud is stopping; try again later"


class GradientScheduler:
    """A thread that fills one pass after another from the queue of requests.

    The owner whose requests took least recently goes first; an owner's requests go in the order they came.
    Requests that can share the pass and fit whole go along. A request too big for one pass is cut: while
    others wait it gets half of each pass, and returns to the end of the queue for the rest. So whoever fits
    beside it waits only for the pass at work. Opening updates queue for the device beside our passes
    (`DeviceLock`).
    """

    def __init__(
        self, engine: UpdateEngine, *, waiting: int = 64, retry_ms: int = 500, alone: bool = False
    ) -> None:
        """`waiting` is the longest queue; who comes then is refused, and may retry after `retry_ms`.

        With `alone` no pass has two requests, and others do not change how a request is cut.
        """
        self._engine, self._most, self._retry_ms, self._alone = engine, waiting, retry_ms, alone
        self._share = FairShare()  # of rows, by the blocks that they run through
        self._changed = threading.Condition()  # of what follows
        self._queue: list[_Task] = []
        self._is_open = True
        self._moved = time.monotonic()  # when it last began a round
        self._worker = threading.Thread(target=self._work, name="perfit-steps", daemon=True)
        self._worker.start()

    @property
    def caches_activations(self) -> bool:
        """Whether steps run from cached activations."""
        return self._engine.caches_activations

    def health(self) -> EngineHealth:
        """Without the condition, which a stuck thread may hold.

        A round waits for the passes before it at the device. It counts as progressing while they do.
        """
        waiting, is_alive = len(self._queue), self._is_open and self._worker.is_alive()
        stalled = time.monotonic() - max(self._moved, self._engine.moved) if waiting else 0.0
        return EngineHealth(0, waiting, stalled, is_alive)

    @property
    def scores_waiting(self) -> int:
        """How many of the waiting requests are for scores; without the condition, as `health`."""
        return sum(task.is_score for task in list(self._queue))

    def open(
        self,
        examples: Sequence[Pair],
        artefact: Artefact,
        *,
        left: threading.Event | None = None,
        owner: str = "",
    ) -> UpdateSession:
        """The session of an update, as the engine's."""
        return self._engine.open(examples, artefact, left=left, owner=owner)

    def open_stateless(
        self, pairs: Sequence[Pair], use: ShiftUse, *, left: threading.Event | None = None, owner: str = ""
    ) -> StatelessSession:
        """The session of a single call, as the stateless engine's."""
        return self._engine.stateless.open(pairs, use, left=left, owner=owner)

    def submit(self, step: GradientRequest, *, loss_only: bool = False) -> Future[Gradient]:
        """The step's loss and gradient (without tensors for `loss_only`), as if it were alone.

        Cancelling the future takes the step out of the queue; a pass at work goes on, and closing the
        session waits for it. Raises Busy or Unavailable, and InvalidInput or InvalidTensors on an
        impossible step. The future may end in any of these but Busy, or in a PerfitError that says what
        failed where.
        """
        total = Sum(step, differentiate=not loss_only)
        return self._enqueue(total, total.gradient)

    def score(self, step: GradientRequest) -> Future[list[Score]]:
        """The log-likelihood of each example; a pass without gradients. Otherwise as `submit`."""
        total = Sum(step, differentiate=False)
        return self._enqueue(total, total.scores, is_score=True)

    def _enqueue(self, total: Sum, found: Callable[[], Any], *, is_score: bool = False) -> Future[Any]:
        task = _Task(total, found, is_score=is_score)
        with self._changed:
            if not self._is_open:
                raise Unavailable(_STOPPING)
            self._queue = [task for task in self._queue if not task.future.done()]
            if len(self._queue) >= self._most:
                raise Busy("too many requests wait for the cloud; try again shortly", retry_ms=self._retry_ms)
            if not self._queue:
                self._moved = time.monotonic()
            self._queue.append(task)
            self._changed.notify()
        return task.future

    def close(self) -> None:
        """End every request that waits and every update; waits for the pass at work."""
        with self._changed:
            self._is_open = False
            self._changed.notify()
        self._worker.join()
        self._engine.close()

    # -- the worker ----------------------------------------------------------------------------

    def _work(self) -> None:
        try:
            while self._round():
                pass
        finally:  # nobody is left waiting
            with self._changed:
                self._is_open = False
                for task in self._queue:
                    task.fail(Unavailable(_STOPPING))
                self._queue = []

    def _round(self) -> bool:
        """Run one pass, in a frame of its own, so that the waiting thread holds nobody's tensors."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue or not self._is_open)
            if not self._is_open:
                return False
            self._queue = [each for each in self._queue if not each.future.cancelled()]
            taken = self._next()
        self._moved = time.monotonic()
        self._run(taken)
        with self._changed:
            self._queue = [task for task in self._queue if task not in taken]
            self._queue += [task for task in taken if not task.future.done()]
            if not self._queue:
                self._share.wanted_by(())  # forget who had what
        return True

    def _next(self) -> dict[_Task, Indices]:
        """What the next pass takes: the first request or a part of it, and others that fit whole."""
        taken: dict[_Task, Indices] = {}
        room = 0
        self._share.wanted_by(task.owner for task in self._queue)
        for task in sorted(self._queue, key=lambda task: self._share.had(task.owner)):
            cost = task.cost
            if not taken:
                kind, room = task.total.kind, task.total.session.engine.budget.rows
                is_shared = cost > room and len(self._queue) > 1 and not self._alone
                taken[task] = task.take(room // 2 if is_shared else room)
                room -= room // 2 if is_shared else cost
            elif task.total.kind == kind and cost <= room and not self._alone:
                taken[task] = task.take(room)
                room -= cost
            else:
                continue
            self._share.charge(task.owner, (cost - task.cost) * task.blocks)
        return taken

    def _run(self, taken: dict[_Task, Indices]) -> None:
        """Run all that was taken, in as many passes as it needs, and end the requests that are done."""
        tasks = {task.total: task for task in taken}
        if taken:
            for shares in cut_into_passes([(task.total, which) for task, which in taken.items()]):
                self._run_pass([share for share in shares if not tasks[share[0]].future.done()], tasks)
        for task in taken:
            task.end_if_done()

    def _run_pass(self, shares: Sequence[PassShare], tasks: dict[Sum, _Task]) -> None:
        """Run a pass. If it fails, run each request alone, so that only the culprit fails."""
        if not shares:
            return
        try:
            shares[0][0].session.engine.run_pass(shares)
        except Exception as error:
            if len(shares) == 1:
                tasks[shares[0][0]].fail(error)
                return
            for share in shares:
                self._run_pass([share], tasks)


class _Task:
    """A request on its way through the queue."""

    def __init__(self, total: Sum, found: Callable[[], Any], *, is_score: bool) -> None:
        """`found`: what the future ends in, once every part is in the sum."""
        self.is_score = is_score
        self.future: Future[Any] = Future()
        self.owner = total.session.owner
        self.total = total
        self._found = found
        self.blocks = total.session.depth * (2 if total.differentiate else 1)  # that a row runs through
        costs = total.session.costs(total.examples[total.pending])
        order = np.argsort(costs, kind="stable")  # examples of like length together pad least
        self._rest: Indices = total.pending[order]
        self._costs = costs[order]

    @property
    def cost(self) -> int:
        """Rows that are still to do."""
        return int(self._costs.sum())

    def take(self, room: int) -> Indices:
        """The next examples that fit into so many rows, with the padding of whole examples; one at least."""
        keys = self.total.session.engine.budget.within(room).keys
        first = next(BatchBudget(room, keys).cut(self._costs, self._costs), self._rest[:0])
        taken, count = self._rest[: len(first)], len(first)
        self._rest, self._costs = self._rest[count:], self._costs[count:]
        return taken

    def end_if_done(self) -> None:
        if not len(self._rest) and self._may_end():
            self.future.set_result(self._found())

    def fail(self, error: Exception) -> None:
        """The future's end. An error's frames hold tensors, which should not live as long as it does."""
        if not isinstance(error, PerfitError):
            error = PerfitError(error_location(error))
        error.__context__ = error.__cause__ = None
        if self._may_end():
            self.future.set_exception(error.with_traceback(None))

    def _may_end(self) -> bool:
        """From here on the future cannot be cancelled."""
        return not self.future.done() and self.future.set_running_or_notify_cancel()
