"""Whose turn it is on the model's device."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
from tests.support.models import build, random_shift
from tests.support.waiting import SECONDS, wait_for

from perfit_cloud.engine.device_lock import DeviceLock
from perfit_cloud.engine.fairness import FairShare
from perfit_cloud.engine.gradients.stateless import GradientEngine
from perfit_cloud.engine.interface import EngineHealth, ShiftUse
from perfit_shared.types import Mode


def test_one_at_a_time_in_the_order_asked() -> None:
    device_lock, order = DeviceLock(), []

    def wait(name: str) -> None:
        with device_lock.hold():
            order.append(name)

    threads = []
    with device_lock.hold():
        for name in "abc":
            thread = threading.Thread(target=wait, args=(name,))
            thread.start()
            until_waiting(device_lock, len(threads) + 1)
            threads.append(thread)
        assert order == []
    for thread in threads:
        thread.join(SECONDS)
    assert order == ["a", "b", "c"]


class Clock:
    """Stands still but when told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def until_waiting(device_lock: DeviceLock, count: int = 1) -> None:
    wait_for(lambda: device_lock.health().waiting >= count, what="somebody waits for the device")


def test_who_looks_while_a_long_idle_device_is_taken_sees_no_standstill() -> None:
    """For a moment it was taken and had not moved since its last use, hours ago: health said NOT_SERVING."""
    seen: list[EngineHealth] = []
    is_looking = True  # not before there is a lock

    def look() -> float:
        nonlocal is_looking
        if not is_looking:
            is_looking = True
            seen.append(device_lock.health())
            is_looking = False
        return time.monotonic()

    device_lock = DeviceLock(look)
    device_lock.moved -= 3600
    is_looking = False
    with device_lock.hold():
        pass
    assert any(health.running for health in seen)
    assert max(health.stalled_seconds for health in seen) < 60


@pytest.mark.parametrize(("block", "step"), [(0.05, 0.003), (0.02, 0.1), (0.01, 0.01)])
def test_answers_and_a_long_pass_have_the_device_for_as_long_as_each_other(block: float, step: float) -> None:
    """A step of the answers between two blocks, however long those were, made answers ten times slower."""
    clock, done, had = Clock(), threading.Event(), {"answers": 0.0, "long": 0.0}
    device_lock = DeviceLock(clock)

    def answers() -> None:
        with device_lock.hold():
            while not done.is_set():
                clock.now += step
                had["answers"] += step
                device_lock.yield_to_waiting()

    thread = threading.Thread(target=answers)
    with device_lock.hold_long():
        thread.start()
        until_waiting(device_lock)
        for _ in range(60):
            clock.now += block
            had["long"] += block
            device_lock.yield_to_waiting()
            assert abs(had["answers"] - had["long"]) <= block + step + 1e-9
        done.set()
    thread.join(SECONDS)
    assert not thread.is_alive()
    assert had["answers"] > 60 * block - block - step


def test_a_scrub_goes_between_two_passes_of_answers() -> None:
    device_lock, log = DeviceLock(), []

    def scrub() -> None:
        with device_lock.hold("sweep"):
            log.append("sweep")

    thread = threading.Thread(target=scrub)
    with device_lock.hold():
        thread.start()
        until_waiting(device_lock)
        device_lock.yield_to_waiting()
        log.append("answers")
    thread.join(SECONDS)
    assert log == ["sweep", "answers"]


def long_passes(clock: Clock, device_lock: DeviceLock, calls: list[tuple[str, float, int]]) -> list[str]:
    """Whose passes came in which order, of calls (owner, seconds of a pass, passes) that wait together."""
    log: list[str] = []

    def run(owner: str, seconds: float, passes: int) -> None:
        for _ in range(passes):
            with device_lock.hold_long({owner: 1.0}):
                log.append(owner)
                clock.now += seconds

    threads = [threading.Thread(target=run, args=call) for call in calls]
    with device_lock.hold_long({"first": 1.0}):
        for number, thread in enumerate(threads):
            thread.start()
            until_waiting(device_lock, number + 1)
    for thread in threads:
        thread.join(SECONDS)
    return log


def test_long_passes_go_by_device_not_by_call() -> None:
    """Four gradients of one device made another's wait for all of them."""
    clock = Clock()
    order = long_passes(clock, DeviceLock(clock), [("a", 1.0, 3)] * 4 + [("b", 1.0, 3)])
    assert order[:6] in (list("ababab"), list("bababa"))
    assert order[6:] == ["a"] * 9


def test_a_device_with_short_passes_waits_for_few_of_one_with_long_ones() -> None:
    clock = Clock()
    order = "".join(long_passes(clock, DeviceLock(clock), [("a", 1.0, 1)] * 4 + [("b", 0.25, 1)] * 12))
    assert order == "abbbb" * 3 + "a"  # as much time for one as for the other


def test_who_comes_back_is_not_ahead_of_who_stayed() -> None:
    share = FairShare()
    share.wanted_by("ab")
    share.charge("a", 5)
    share.wanted_by("a")  # b left for long
    share.charge("a", 5)
    share.wanted_by("a")
    share.wanted_by("abc")
    assert share.had("b") == share.had("c") == share.had("a") == 10
    share.charge("b", 3)
    share.wanted_by("ac")  # b left for a moment
    share.wanted_by("abc")
    assert share.had("b") == 13
    share.wanted_by("")
    assert share.had("a") == share.had("b") == 0  # nobody wanted it: all begin anew


def test_breathing_alone_costs_no_turn() -> None:
    device_lock = DeviceLock()
    with device_lock.hold():
        device_lock.yield_to_waiting()
        assert device_lock.health().running
    assert not device_lock.health().running


def test_long_passes_wait_for_each_others_end_and_let_short_ones_in() -> None:
    device_lock, log, inside = DeviceLock(), [], threading.Event()

    def long() -> None:
        inside.set()
        with device_lock.hold_long():
            log.append("long")

    def short() -> None:
        with device_lock.hold():
            log.append("short")

    threads = [threading.Thread(target=long), threading.Thread(target=short)]
    with device_lock.hold_long():
        for thread in threads:
            thread.start()
        assert inside.wait(SECONDS)
        until_waiting(device_lock, 2)
        device_lock.yield_to_waiting()
        log.append("end of the first")
    for thread in threads:
        thread.join(SECONDS)
    assert log == ["short", "end of the first", "long"]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_stateless_passes_breathe_behind_every_block(
    family: str, make_artefact: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, device_lock, breaths = build(family), DeviceLock(), []
    artefact = make_artefact(base)  # at blocks 1 and 2 of 4
    use = ShiftUse(Mode.PERSONAL, artefact, random_shift(artefact.spec, artefact.spec.personal_rank, 1))
    engine = GradientEngine(base, device_lock)
    monkeypatch.setattr(device_lock, "yield_to_waiting", lambda: breaths.append(device_lock.health().running))
    engine.score([([0, 5, 6], [7, 1])], use)
    assert breaths == [True] * 4
    engine.gradient([([0, 5, 6], [7, 1])], use)
    assert breaths[4:] == [True] * (4 + 3), "forward, and back to the first that the tensors change"
    engine.close()
