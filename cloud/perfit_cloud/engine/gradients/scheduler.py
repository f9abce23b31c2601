"""Steps of different users that wait at the same moment, run as one pass."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace

import numpy as np

from perfit_cloud.engine.errors import error_location
from perfit_cloud.engine.fairness import FairShare
from perfit_cloud.engine.gradients.batch import Pair
from perfit_cloud.engine.gradients.session import GradientRequest, UpdateEngine, UpdateSession
from perfit_cloud.engine.interface import Gradient, Vital
from perfit_cloud.model.artefacts import Artefact
from perfit_shared.errors import Busy, PerfitError, Unavailable
from perfit_shared.shifts import LayerShift, ShiftTensors

__all__ = ["GradientScheduler"]

_STOPPING = "the cloud is stopping; try again later"


class GradientScheduler:
    """A thread that takes, again and again, as many of the waiting steps as one pass holds.

    The owner who had least of late goes first, whose steps go in the order they came. A step too big for
    one pass is cut: while others wait it gets half of each, and goes to the end of the line for the rest.
    So whoever fits beside it waits for what is at work, and for no other step. The device has a line of its
    own (`Turns`), in which updates that open, Score and ComputeGradient stand beside our passes.
    """

    def __init__(
        self, engine: UpdateEngine, *, waiting: int = 64, retry_ms: int = 500, alone: bool = False
    ) -> None:
        """`waiting`: the most steps in line; who comes then is told to come back in `retry_ms`.

        `alone`: no pass has two steps, and none is cut otherwise because others wait.
        """
        self._engine, self._most, self._retry_ms, self._alone = engine, waiting, retry_ms, alone
        self._share = FairShare()  # of the rows of passes
        self._changed = threading.Condition()  # of what follows
        self._line: list[_Task] = []
        self._is_open = True
        self._moved = time.monotonic()  # when it last began a round
        self._worker = threading.Thread(target=self._work, name="perfit-steps", daemon=True)
        self._worker.start()

    @property
    def keeps(self) -> bool:
        """As the engine's."""
        return self._engine.keeps

    def health(self) -> Vital:
        """Without the condition: whoever is stuck may hold it.

        A round waits for one pass each of all who stand before it at the device; as they get on, so does it.
        """
        waiting, is_alive = len(self._line), self._is_open and self._worker.is_alive()
        still = time.monotonic() - max(self._moved, self._engine.moved) if waiting else 0.0
        return Vital(0, waiting, still, is_alive)

    def open(
        self,
        examples: Sequence[Pair],
        artefact: Artefact,
        *,
        left: threading.Event | None = None,
        owner: str = "",
    ) -> UpdateSession:
        """As the engine's."""
        return self._engine.open(examples, artefact, left=left, owner=owner)

    def submit(self, step: GradientRequest, *, loss_only: bool = False) -> Future[Gradient]:
        """The step's loss and gradient (without tensors for `loss_only`), as if it were alone.

        Cancelling the future takes the step out of the line; a pass at work goes on. Raises Busy or
        Unavailable, and InvalidInput or InvalidTensors on a step that cannot be; the future may end
        in any of these but Busy, and in a PerfitError that says what failed where.
        """
        task = _Task(step, self._engine.pass_rows_of(step), loss_only=loss_only)
        with self._changed:
            if not self._is_open:
                raise Unavailable(_STOPPING)
            if len(self._line) >= self._most:
                raise Busy("too many updates wait for the cloud; try again shortly", retry_ms=self._retry_ms)
            if not self._line:
                self._moved = time.monotonic()
            self._line.append(task)
            self._changed.notify()
        return task.future

    def close(self) -> None:
        """End every step that waits and every adaptation; waits for the pass at work."""
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
        finally:  # however it ends: nobody is left waiting
            with self._changed:
                self._is_open = False
                for task in self._line:
                    task.fail(Unavailable(_STOPPING))
                self._line = []

    def _round(self) -> bool:
        """One pass, in a frame of its own: while the thread waits it holds nobody's tensors."""
        with self._changed:
            self._changed.wait_for(lambda: self._line or not self._is_open)
            if not self._is_open:
                return False
            self._line = [task for task in self._line if not task.future.cancelled()]
            pieces = self._next_pieces()
        self._moved = time.monotonic()
        for loss_only in (False, True):
            of_kind = [piece for piece in pieces if piece[0].loss_only == loss_only]
            if of_kind:
                self._run(of_kind, loss_only=loss_only)
        with self._changed:
            taken = [task for task, _ in pieces]
            self._line = [task for task in self._line if task not in taken]
            self._line += [task for task in taken if not task.future.done()]
            if not self._line:
                self._share.wanted_by(())  # forget who had what
        return True

    def _next_pieces(self) -> list[tuple[_Task, GradientRequest]]:
        """What the next pass takes on: the first task or a part of it, and others that fit whole."""
        pieces: list[tuple[_Task, GradientRequest]] = []
        room = most = self._engine.pass_rows
        self._share.wanted_by(task.owner for task in self._line)
        for task in sorted(self._line, key=lambda task: self._share.had(task.owner)):
            cost = task.cost
            if not pieces and cost > most and len(self._line) > 1 and not self._alone:
                room -= most // 2
                pieces.append((task, task.cut(most // 2)))
            elif not pieces or (cost <= room and not self._alone):
                room -= cost
                pieces.append((task, task.cut(most)))
            else:
                continue
            self._share.charge(task.owner, cost - task.cost)
        return pieces

    def _run(self, pieces: Sequence[tuple[_Task, GradientRequest]], *, loss_only: bool) -> None:
        """What fails is run again, each alone, so that everyone fails for themselves."""
        steps = [step for _, step in pieces]
        try:
            if loss_only:
                found = [Gradient(*of_step, ShiftTensors({})) for of_step in self._engine.losses(steps)]
            else:
                found = self._engine.gradients(steps)
        except Exception as error:
            if len(pieces) == 1:
                pieces[0][0].fail(error)
                return
            for piece in pieces:
                self._run([piece], loss_only=loss_only)
            return
        for (task, _), gradient in zip(pieces, found, strict=True):
            task.add(gradient)


class _Task:
    """A step on its way through the line, and what passes have found of it so far."""

    def __init__(self, step: GradientRequest, costs: np.typing.NDArray[np.int64], *, loss_only: bool) -> None:
        """`costs`: rows that each example brings to a pass."""
        self.future: Future[Gradient] = Future()
        self.owner = step.session.owner
        self.loss_only = loss_only
        order = np.argsort(costs, kind="stable")  # examples of like length together pad least
        self.rows = np.array(step.rows)[order]  # examples still to do
        self._costs = costs[order]
        self._step = step
        self._found: list[Gradient] = []

    @property
    def cost(self) -> int:
        return int(self._costs.sum())

    def cut(self, room: int) -> GradientRequest:
        """The next examples that fit into so many rows, one at least, as a step of their own."""
        count = max(1, int(np.searchsorted(self._costs.cumsum(), room, side="right")))
        step = replace(self._step, rows=self.rows[:count].tolist())
        self.rows, self._costs = self.rows[count:], self._costs[count:]
        return step

    def add(self, found: Gradient) -> None:
        """The future's end, if nothing is left to do."""
        self._found.append(found)
        if not len(self.rows) and self._may_end():
            self.future.set_result(_joined(self._found))

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


def _joined(parts: Sequence[Gradient]) -> Gradient:
    """One step from its parts: means over tokens, so parts weigh as many tokens as they have."""
    if len(parts) == 1:
        return parts[0]
    tokens = sum(part.tokens for part in parts)
    weights = [np.float32(part.tokens / tokens) for part in parts]
    layers = {}
    for layer in parts[0].tensors.layers:
        stacks = zip(*(part.tensors.layers[layer] for part in parts), strict=True)
        # Not by BLAS, which would keep copies of them.
        layers[layer] = LayerShift(*(sum(map(np.multiply, weights, s)) for s in stacks))
    loss = sum(part.tokens * part.loss for part in parts) / tokens
    return Gradient(loss, tokens, ShiftTensors(layers))
