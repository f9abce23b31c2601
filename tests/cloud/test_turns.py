"""Whose turn it is on the model's device."""

from __future__ import annotations

import itertools
import threading
import time
from typing import Any

import pytest
from tests.cloud.test_tail import build
from tests.conftest import random_shift

from perfit_cloud.engine.gradients import GradientEngine
from perfit_cloud.engine.turns import Turns
from perfit_cloud.engine.types import Mode, ShiftUse


def test_one_at_a_time_in_the_order_asked() -> None:
    turns, order = Turns(), []

    def wait(name: str) -> None:
        with turns.take():
            order.append(name)

    threads = []
    with turns.take():
        for name in "abc":
            thread = threading.Thread(target=wait, args=(name,))
            thread.start()
            while len(turns._waiting) < len(threads) + 1:
                time.sleep(0.001)
            threads.append(thread)
        assert order == []
    for thread in threads:
        thread.join(5)
    assert order == ["a", "b", "c"]


def test_who_looks_while_a_long_idle_device_is_taken_sees_no_standstill(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """For a moment it was taken and had not moved since its last use, hours ago: health said NOT_SERVING."""
    turns, seen = Turns(), []
    turns.moved -= 3600

    def look() -> float:
        monkeypatch.undo()
        seen.append(turns.vital())
        monkeypatch.setattr(time, "monotonic", look)
        return monotonic()

    monotonic = time.monotonic
    monkeypatch.setattr(time, "monotonic", look)
    with turns.take():
        pass
    assert any(vital.running for vital in seen)
    assert max(vital.still_seconds for vital in seen) < 60


def test_a_long_pass_lets_others_in_and_goes_on_after_one_turn_of_theirs() -> None:
    turns, log, done = Turns(), [], threading.Event()

    def answers() -> None:
        while not done.is_set():
            with turns.take():
                log.append("step")

    thread = threading.Thread(target=answers)
    with turns.take():
        thread.start()
        for _ in range(20):
            while not turns._waiting:
                time.sleep(0.001)
            log.append("block")
            turns.breathe()
        done.set()
    thread.join(5)
    assert not thread.is_alive()
    blocks = [i for i, what in enumerate(log) if what == "block"]
    # Exactly one step of the others between two blocks: neither waits for two of the other.
    assert all(later - earlier == 2 for earlier, later in itertools.pairwise(blocks))


def test_breathing_alone_costs_no_turn() -> None:
    turns = Turns()
    with turns.take():
        turns.breathe()
        assert turns._is_taken
    assert not turns._is_taken


def test_long_passes_wait_for_each_others_end_and_let_short_ones_in() -> None:
    turns, log, inside = Turns(), [], threading.Event()

    def long() -> None:
        inside.set()
        with turns.take_long():
            log.append("long")

    def short() -> None:
        with turns.take():
            log.append("short")

    threads = [threading.Thread(target=long), threading.Thread(target=short)]
    with turns.take_long():
        for thread in threads:
            thread.start()
        assert inside.wait(5)
        while not turns._waiting or not turns._long._waiting:
            time.sleep(0.001)
        turns.breathe()
        log.append("end of the first")
    for thread in threads:
        thread.join(5)
    assert log == ["short", "end of the first", "long"]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_stateless_passes_breathe_behind_every_block(
    family: str, make_artefact: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, turns, breaths = build(family), Turns(), []
    artefact = make_artefact(base)  # at blocks 1 and 2 of 4
    use = ShiftUse(Mode.PERSONAL, artefact, random_shift(artefact.spec, artefact.spec.personal_rank, 1))
    engine = GradientEngine(base, turns)
    monkeypatch.setattr(turns, "breathe", lambda: breaths.append(turns._is_taken))
    engine.score([([0, 5, 6], [7, 1])], use)
    assert breaths == [True] * 4
    engine.gradient([([0, 5, 6], [7, 1])], use)
    assert breaths[4:] == [True] * (4 + 3), "forward, and back to the first that the tensors change"
    engine.close()
