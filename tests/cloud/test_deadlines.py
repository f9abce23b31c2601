"""The thread that ends calls."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest
from tests.support.cloud import TIMEOUT, Running, generate
from tests.support.doubles import Held
from tests.support.waiting import wait_for

from perfit_cloud.service import deadlines
from perfit_cloud.service.deadlines import Deadlines


def test_what_is_late_is_cut_and_what_was_left_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deadlines, "_IDLE_SECONDS", 0.2)
    watch, cut = Deadlines(), []
    with watch.after(0.05, lambda: cut.append("left")):
        pass
    with watch.after(0.05, lambda: cut.append("late")), watch.after(60, lambda: cut.append("early")):
        wait_for(lambda: bool(cut))
        assert watch._is_running
    time.sleep(0.3)
    assert cut == ["late"]
    wait_for(lambda: not watch._is_running)  # there is nothing to watch
    with watch.after(0.05, lambda: cut.append("again")):
        wait_for(lambda: len(cut) == 2)
    assert cut == ["late", "again"]


def test_a_cut_that_fails_costs_no_other_call_its_end() -> None:
    """The thread ended with it, and no later call was cut off."""
    watch, cut = Deadlines(), []
    with watch.after(0.05, lambda: 1 / 0), watch.after(0.05, lambda: cut.append("beside")):
        wait_for(lambda: cut == ["beside"])
    with watch.after(0.05, lambda: cut.append("later")):
        wait_for(lambda: cut == ["beside", "later"])


def test_a_system_out_of_threads_costs_that_call_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread counted as running although it had not started, and no later call had an end."""

    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    watch, cut = Deadlines(), []
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(RuntimeError), watch.after(0.05, lambda: cut.append("never begun")):
            pass
    with watch.after(0.05, lambda: cut.append("late")):
        wait_for(lambda: bool(cut))
    assert cut == ["late"]


def test_answers_have_no_thread_each_for_their_end(run: Callable[..., Running]) -> None:
    held = Held()
    device = run(engine=held, answers_each=6).device()
    streams = [device.stub.Generate(generate(), timeout=TIMEOUT) for _ in range(6)]
    wait_for(lambda: held.running == 6)
    for answer in held.answers:
        answer.step()
    assert all(next(stream).text for stream in streams)
    assert not [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)]
    for answer in held.answers:
        answer.finish()
    for stream in streams:
        list(stream)
