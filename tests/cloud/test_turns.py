"""Whose turn it is on the model's device."""

from __future__ import annotations

import itertools
import threading
import time

from perfit_cloud.engine.turns import Turns


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
