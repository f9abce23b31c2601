"""Steps that wait together run together, and each gets what it would get alone."""

from __future__ import annotations

import gc
import logging
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future
from typing import Any

import numpy as np
import pytest
from tests.support.gradients import PLENTY, RAGGED, assert_equal, make_pairs, person
from tests.support.models import build
from tests.support.waiting import wait_for

from perfit_cloud.engine.gradients import stateless
from perfit_cloud.engine.gradients.batch import BatchBudget
from perfit_cloud.engine.gradients.requests import Sum
from perfit_cloud.engine.gradients.scheduler import GradientScheduler
from perfit_cloud.engine.gradients.session import GradientRequest, UpdateEngine
from perfit_cloud.engine.gradients.stateless import GradientEngine
from perfit_cloud.engine.interface import ShiftUse
from perfit_shared.errors import Busy, InvalidInput, InvalidTensors, Unavailable
from perfit_shared.shifts import LayerShift, ShiftTensors
from perfit_shared.types import Mode

WAIT = 20


class Held(UpdateEngine):
    """An engine whose next pass begins when a test says so, and that tells which steps ran together."""

    def __init__(self, *args: Any, **how: Any) -> None:
        super().__init__(*args, **how)
        self.go, self.began = threading.Semaphore(10**6), threading.Semaphore(0)
        self.runs: list[list[tuple[Sum, list[int]]]] = []  # of each pass: requests, and their examples

    def hold(self) -> None:
        self.go, self.began = threading.Semaphore(0), threading.Semaphore(0)

    def run_pass(self, shares: Any) -> None:
        self.runs.append([(total, total.examples[which].tolist()) for total, which in shares])
        self.began.release()
        assert self.go.acquire(timeout=WAIT)
        super().run_pass(shares)


@pytest.fixture
def parts(make_artefact: Callable[..., Any]) -> Iterator[tuple[Any, Held, GradientScheduler]]:
    base = build("llama")
    engine = Held(base, keep_bytes=PLENTY)
    queue = GradientScheduler(engine, waiting=40, retry_ms=70)
    yield make_artefact(base), engine, queue
    engine.go.release(10**6)
    queue.close()


def occupy(engine: Held, queue: GradientScheduler, step: GradientRequest) -> Future[Any]:
    """A pass at work, for as long as the test holds it; what is submitted then waits together."""
    engine.hold()
    future = queue.submit(step)
    assert engine.began.acquire(timeout=WAIT)
    return future


def test_steps_that_wait_together_share_passes(parts: Any) -> None:
    artefact, engine, queue = parts
    histories = [make_pairs([5 + i, 9, 20, 3], i) for i in range(12)]
    opened = [queue.open(pairs, artefact) for pairs in histories]
    steps = [GradientRequest(opened[i % 12], [i % 3, 3], person(artefact, i)) for i in range(24)]
    wanted = [engine.gradients([step])[0] for step in steps]
    engine.runs.clear()
    first = occupy(engine, queue, steps[0])
    futures: dict[int, Future[Any]] = {}

    def ask(i: int) -> None:
        futures[i] = queue.submit(steps[i], loss_only=i % 4 == 0)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    engine.go.release(10**6)
    assert_equal(first.result(WAIT), wanted[0])
    for i, future in futures.items():
        got = future.result(WAIT)
        if i % 4 == 0:
            assert (got.loss, got.tokens) == (pytest.approx(wanted[i].loss, rel=1e-5), wanted[i].tokens)
            assert not got.tensors.layers
        else:
            assert_equal(got, wanted[i])
    first_run, *others = [len(run) for run in engine.runs]
    assert (first_run, sorted(others)) == (1, [6, 18])  # losses, and gradients


def test_the_collective_shift_alone_shares_no_pass_with_a_users_own(parts: Any) -> None:
    """The user's tensors were stacked without a place for who has none, and reached both."""
    artefact, engine, _ = parts
    pairs = make_pairs([9, 7, 5])
    with engine.open(pairs, artefact) as mine, engine.open(pairs, artefact) as other:
        steps = [
            GradientRequest(mine, [0, 1, 2], None),
            GradientRequest(other, [0, 1, 2], person(artefact, 1)),
        ]
        alone = [engine.losses([step])[0] for step in steps]
        together = engine.losses(steps)
    assert alone[0][0] != pytest.approx(alone[1][0], rel=1e-3)
    assert [loss for loss, _ in together] == [pytest.approx(loss, rel=1e-6) for loss, _ in alone]


def test_one_who_fails_fails_alone(parts: Any) -> None:
    artefact, engine, queue = parts
    mine, theirs = queue.open(RAGGED, artefact), queue.open(RAGGED, artefact)
    step = GradientRequest(mine, [2, 5], person(artefact, 1))
    (wanted,) = engine.gradients([step])
    narrow = {at: LayerShift(r[:2], w[:2], b[:2]) for at, (r, w, b) in person(artefact, 1).layers.items()}
    with pytest.raises(InvalidTensors, match="shapes"):
        queue.submit(GradientRequest(theirs, [0], ShiftTensors(narrow)))
    with pytest.raises(InvalidInput, match="examples"):
        queue.submit(GradientRequest(theirs, [8], step.personal))
    first = occupy(engine, queue, step)
    futures = [
        queue.submit(step),
        queue.submit(GradientRequest(theirs, [1], step.personal)),
        queue.submit(step),
    ]
    theirs.close()  # it waits in line with the others
    engine.go.release(10**6)
    with pytest.raises(InvalidInput, match="closed"):
        futures[1].result(WAIT)
    for future in (first, futures[0], futures[2]):
        assert_equal(future.result(WAIT), wanted)


def test_a_step_that_failed_leaves_nothing_behind(
    parts: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its error held the frames of the pass, and those the tensors, for as long as it lived."""
    artefact, engine, queue = parts

    def broken(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("zebracanary")

    monkeypatch.setattr(UpdateEngine, "run_pass", broken)
    gc.disable()
    try:
        with caplog.at_level(logging.INFO):
            session, tensors = queue.open(RAGGED, artefact), [person(artefact, n) for n in range(3)]
            futures = [occupy(engine, queue, GradientRequest(session, [2], tensors[0]))]
            futures += [queue.submit(GradientRequest(session, [3, 5], each)) for each in tensors[1:]]
            gone = [weakref.ref(each) for each in tensors]
            tensors.clear()
            engine.go.release(10**6)
            errors = [future.exception(WAIT) for future in futures]
        assert [str(error).partition(":")[0] for error in errors] == [
            "ZeroDivisionError at test_scheduler.py"
        ] * 3
        assert [len(run) for run in engine.runs] == [1, 2, 1, 1]  # together, then each alone
        engine.runs.clear()
        wait_for(lambda: all(ref() is None for ref in gone))
    finally:
        gc.enable()
    assert not caplog.text  # whoever submitted it logs it


def test_who_left_is_not_computed(parts: Any) -> None:
    artefact, engine, queue = parts
    session = queue.open(RAGGED, artefact)
    steps = [GradientRequest(session, [i], person(artefact, i)) for i in range(3)]
    occupy(engine, queue, steps[0])
    gone, there = queue.submit(steps[1]), queue.submit(steps[2])
    assert gone.cancel()
    engine.go.release(10**6)
    assert there.result(WAIT).tokens == session.target_tokens[2]
    with pytest.raises(CancelledError):
        gone.result(WAIT)
    assert [rows for run in engine.runs for _, rows in run] == [[0], [2]]


def test_a_small_step_waits_for_no_more_than_the_pass_at_work(parts: Any) -> None:
    """Two steps of many passes are in line before it, and share what it leaves in turns."""
    artefact, engine, queue = parts
    engine.budget = BatchBudget(120, 2**20, 2**20)
    big = make_pairs([20 + i % 7 for i in range(40)], 1)
    users = [
        queue.open(big, artefact),
        queue.open(big, artefact),
        queue.open(make_pairs([9, 8], 2), artefact),
    ]
    steps = [GradientRequest(user, range(user.examples), person(artefact, i)) for i, user in enumerate(users)]
    wanted = [engine.gradients([step])[0] for step in steps]
    engine.runs.clear()
    futures = [occupy(engine, queue, steps[0]), queue.submit(steps[1]), queue.submit(steps[2])]
    engine.go.release(2)
    assert_equal(futures[2].result(WAIT), wanted[2])
    assert not futures[0].done() and not futures[1].done()
    engine.go.release(10**6)
    for future, gradient in zip(futures, wanted, strict=True):
        assert_equal(future.result(WAIT), gradient)
    device_lock = [[users.index(total.session) for total, _ in run] for run in engine.runs]
    assert device_lock[:2] == [[0], [1, 2]]
    assert {tuple(turn) for turn in device_lock[2:7]} == {(0,), (1,)}
    for user in users[:2]:
        pieces = [rows for run in engine.runs for total, rows in run if total.session is user]
        assert sorted(row for piece in pieces for row in piece) == list(range(40))
        assert max(user.costs(np.array(piece)).sum() for piece in pieces) <= 120


def test_a_cut_step_that_is_cancelled_stops_between_passes(parts: Any) -> None:
    artefact, engine, queue = parts
    engine.budget = BatchBudget(120, 2**20, 2**20)
    session = queue.open(make_pairs([20] * 40, 1), artefact)
    other = queue.open(RAGGED, artefact)
    future = occupy(engine, queue, GradientRequest(session, range(40), person(artefact, 1)))
    later = queue.submit(GradientRequest(other, [3], person(artefact, 1)))
    assert future.cancel()
    engine.go.release(10**6)
    later.result(WAIT)
    assert [[total.session is other for total, _ in run] for run in engine.runs] == [[False], [True]]


def test_scores_and_gradients_of_one_call_are_cut_and_joined_as_if_they_were_alone(
    make_artefact: Callable[..., Any],
) -> None:
    """Cut by rows while others wait, and each example's score in the order that was asked."""
    base = build("llama")
    artefact = make_artefact(base)
    narrow, whole = Held(base, keep_bytes=PLENTY, pass_tokens=60), GradientEngine(base)
    queue, narrow.budget = GradientScheduler(narrow), BatchBudget(60)
    pairs = make_pairs([20, 3, 40, 7, 33, 2, 11], 4)
    use = ShiftUse(Mode.PERSONAL, artefact, person(artefact, 2))
    stepping = queue.open(RAGGED, artefact)
    futures = [occupy(narrow, queue, GradientRequest(stepping, range(8), person(artefact, 1)))]
    with queue.open_stateless(pairs, use) as scored, queue.open_stateless(pairs, use) as differentiated:
        scores, gradient = queue.score(scored.whole), queue.submit(differentiated.whole)
        futures.append(queue.submit(GradientRequest(stepping, [2, 4], person(artefact, 3))))
        narrow.go.release(10**6)
        for got, wanted in zip(scores.result(WAIT), whole.score(pairs, use), strict=True):
            assert got.tokens == wanted.tokens
            assert got.log_likelihood == pytest.approx(wanted.log_likelihood, rel=1e-5)
        assert_equal(gradient.result(WAIT), whole.gradient(pairs, use))
    for future in futures:
        future.result(WAIT)
    queue.close()
    whole.close()


def test_a_call_is_not_over_before_the_pass_that_computes_for_it(
    parts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its tensors would still be in memory."""
    artefact, _, queue = parts
    entered, go_on, compute = threading.Event(), threading.Event(), stateless.pass_in_full

    def slow(*given: Any) -> Any:
        entered.set()
        assert go_on.wait(WAIT)
        return compute(*given)

    monkeypatch.setattr(stateless, "pass_in_full", slow)
    session = queue.open_stateless(RAGGED, ShiftUse(Mode.PERSONAL, artefact, person(artefact, 1)))
    future = queue.submit(session.whole)
    assert entered.wait(WAIT)
    assert future.cancel()
    closing = threading.Thread(target=session.close)
    closing.start()
    closing.join(0.1)
    assert closing.is_alive()
    go_on.set()
    closing.join(WAIT)
    assert not closing.is_alive()
    with pytest.raises(InvalidInput, match="closed"):
        queue.submit(session.whole)


def test_too_many_come_back_later(parts: Any) -> None:
    artefact, engine, queue = parts
    step = GradientRequest(queue.open(RAGGED, artefact), [2], person(artefact, 1))
    futures = [occupy(engine, queue, step)]
    with pytest.raises(Busy) as caught:
        for _ in range(41):
            futures.append(queue.submit(step))
    assert caught.value.retry_ms == 70 and len(futures) == 40
    engine.go.release(10**6)
    for future in futures:
        assert future.result(WAIT).tokens == step.session.target_tokens[2]


def test_a_call_takes_as_few_passes_in_the_scheduler_as_alone(parts: Any) -> None:
    """Six examples, 50 rows, were taken for a pass of 50; padded they are 54, so the sixth ran by itself."""
    artefact = parts[0]
    engine = UpdateEngine(build("llama"), keep_bytes=PLENTY, pass_tokens=50)
    ran: list[int] = []
    run_pass = engine.stateless.run_pass

    def noted(shares: Any) -> None:
        ran.append(sum(len(which) for _, which in shares))
        run_pass(shares)

    engine.stateless.run_pass = noted  # type: ignore[method-assign]
    pairs = [([5] * 6, [7, 8])] * 4 + [([5] * 7, [7, 8])] * 4
    use = ShiftUse(Mode.PERSONAL, artefact, person(artefact, 1))
    engine.stateless.gradient(pairs, use)
    alone, ran[:] = list(ran), []
    queue = GradientScheduler(engine)
    queue.submit(queue.open_stateless(pairs, use).whole).result(WAIT)
    queue.close()
    assert ran == alone == [5, 3]


def test_who_has_an_answer_takes_no_place_among_those_who_wait(parts: Any) -> None:
    """The next step of a device comes from the end of the one before, which still stood in the queue."""
    artefact, engine, _ = parts
    queue, again = GradientScheduler(engine, waiting=1), list[Future[Any]]()
    step = GradientRequest(queue.open(RAGGED, artefact), [2], person(artefact, 1))
    first = occupy(engine, queue, step)
    first.add_done_callback(lambda _: again.append(queue.submit(step)))  # in the worker's thread
    engine.go.release(10**6)
    wait_for(lambda: again)
    assert again[0].result(WAIT).tokens == first.result(WAIT).tokens
    queue.close()


def test_close_ends_every_wait(parts: Any) -> None:
    artefact, engine, queue = parts
    step = GradientRequest(queue.open(RAGGED, artefact), [2], person(artefact, 1))
    at_work, waiting = occupy(engine, queue, step), queue.submit(step)
    closing = threading.Thread(target=queue.close)
    closing.start()
    wait_for(lambda: not queue.health().is_alive)  # or the worker could take the one that waits
    engine.go.release(10**6)
    closing.join(WAIT)
    assert at_work.result(WAIT).tokens > 0
    with pytest.raises(Unavailable):
        waiting.result(WAIT)
    with pytest.raises(InvalidInput, match="closed"):
        queue.submit(step)
    assert engine.bytes_held() == (0, 0)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_worker_that_dies_leaves_nobody_waiting(parts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    artefact, engine, queue = parts
    step = GradientRequest(queue.open(RAGGED, artefact), [2], person(artefact, 1))
    futures = [occupy(engine, queue, step), queue.submit(step)]

    def die(*_: Any, **__: Any) -> None:
        raise SystemExit

    monkeypatch.setattr(UpdateEngine, "run_pass", die)
    engine.go.release(10**6)
    for future in futures:
        with pytest.raises(Unavailable):
            future.result(WAIT)
    with pytest.raises(Unavailable):
        queue.submit(step)
