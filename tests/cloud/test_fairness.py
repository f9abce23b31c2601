"""Several devices on one model: whose passes, prompts and places come first."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from tests.support.cloud import BASE, TIMEOUT, Running, failure
from tests.support.doubles import score
from tests.support.gradients import PLENTY, RAGGED, assert_equal, person
from tests.support.limits import running_line, under_way
from tests.support.models import build
from tests.support.waiting import wait_for

from perfit_cloud.engine.device_lock import DeviceLock
from perfit_cloud.engine.fairness import PrefillScheduler
from perfit_cloud.engine.generation.continuous import GenerationEngine
from perfit_cloud.engine.generation.static import BatchedEngine
from perfit_cloud.engine.gradients.scheduler import GradientScheduler
from perfit_cloud.engine.gradients.session import GradientRequest, UpdateEngine
from perfit_cloud.engine.gradients.stateless import GradientEngine
from perfit_cloud.engine.interface import Engine, GenerationSettings, ShiftUse
from perfit_cloud.model.artefacts import Artefact
from perfit_cloud.model.base import BaseModel
from perfit_shared.types import Mode, Sampling
from perfit_shared.wire import personalization_pb2 as pb

# -- scores and gradients ------------------------------------------------------------------------


@pytest.fixture
def lined(base: BaseModel) -> Iterator[tuple[DeviceLock, GradientScheduler]]:
    """A scheduler on a device that a test can hold."""
    device_lock = DeviceLock()
    steps = GradientScheduler(UpdateEngine(base, keep_bytes=2**20, device_lock=device_lock))
    yield device_lock, steps
    steps.close()


def test_passes_wait_in_a_bounded_line(
    run: Callable[..., Running], lined: tuple[DeviceLock, GradientScheduler]
) -> None:
    device_lock, steps = lined
    device = run(steps=steps, gradient_waiting=1).device()
    with device_lock.hold_long():
        first = device.stub.Score.future(score(), timeout=TIMEOUT)
        wait_for(lambda: device_lock.health().waiting == 1)
        # One of two more finds room in the line, and stands there until its deadline.
        more = [device.stub.Score.future(score(), timeout=3) for _ in range(2)]
        outcomes = sorted(failure(call.result)[0] for call in more)
        assert outcomes == ["DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED"]
    assert len(first.result().scores) == 1


def test_passes_are_fair_by_device(
    run: Callable[..., Running], base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four long calls of one device were done before another's short one began: 48 s instead of 71 ms."""
    device_lock, passes = DeviceLock(), list[str]()
    engine = UpdateEngine(base, keep_bytes=2**20, device_lock=device_lock, pass_tokens=8)
    run_pass = engine.stateless.run_pass

    def noted(shares: Any) -> None:
        passes.append(shares[0][0].session.owner)
        run_pass(shares)

    monkeypatch.setattr(engine.stateless, "run_pass", noted)
    steps = GradientScheduler(engine)
    running = run(steps=steps)
    greedy, honest = running.device(), running.device()
    many = pb.ScoreRequest(candidates=[score().candidates[0]] * 8, shift=BASE)  # eight passes
    with device_lock.hold_long():
        held = [greedy.stub.Score.future(many, timeout=TIMEOUT) for _ in range(4)]
        wait_for(lambda: steps.health().waiting == 4)
        mine = honest.stub.Score.future(score(), timeout=TIMEOUT)
        wait_for(lambda: steps.health().waiting == 5)
    assert len(mine.result().scores) == 1
    assert [len(call.result().scores) for call in held] == [8] * 4
    steps.close()
    assert passes.count(greedy.identity) >= 32
    # The pass that was at work, and no other, goes before.
    assert passes.index(honest.identity) <= 1


def test_scores_and_steps_stand_in_one_line(base: BaseModel, artefact: Artefact) -> None:
    """A device's scores stood in a line of their own, and came as often as another's steps beside them."""
    device_lock = DeviceLock()
    steps = GradientScheduler(UpdateEngine(base, keep_bytes=2**20, device_lock=device_lock))
    pairs, order = [([5, 6, 7], [8])], list[str]()

    def told(owner: str) -> Callable[[object], None]:
        return lambda _: order.append(owner)

    with steps.open(pairs, artefact, owner="stepping") as session:
        scored = [steps.open_stateless(pairs, PLAIN, owner="scoring") for _ in range(3)]
        with device_lock.hold_long():
            futures: list[Any] = [steps.submit(GradientRequest(session, [0], artefact.seed))]  # at work
            wait_for(lambda: device_lock.health().waiting == 1)
            futures += [steps.score(each.whole) for each in scored]
            futures += [
                steps.submit(GradientRequest(session, [0], artefact.seed), loss_only=True) for _ in scored
            ]
            for future, owner in zip(futures, ["stepping", *["scoring"] * 3, *["stepping"] * 3], strict=True):
                future.add_done_callback(told(owner))
        for future in futures:
            future.result(TIMEOUT)
    assert order[:3] == ["stepping", "scoring", "stepping"], "in turns, whoever asked first"
    steps.close()


def test_who_left_stands_in_line_no_more(
    run: Callable[..., Running], lined: tuple[DeviceLock, GradientScheduler]
) -> None:
    """They stood there until it was their turn, and nobody else got their places."""
    device_lock, steps = lined
    running = run(steps=steps, gradient_waiting=3)
    with device_lock.hold_long():
        first = running.device().stub.Score.future(score(), timeout=TIMEOUT)
        device = running.device()
        for _ in range(3):
            calls = [device.stub.Score.future(score(), timeout=TIMEOUT) for _ in range(3)]
            wait_for(lambda: running_line(running) == 3)
            for call in calls:
                call.cancel()
            wait_for(lambda: under_way(running, device) == 0)
        last = device.stub.Score.future(score(), timeout=TIMEOUT)
        wait_for(lambda: steps.health().waiting == 2)
    assert [len(call.result().scores) for call in (first, last)] == [1, 1]


# -- answers -------------------------------------------------------------------------------------


class Planned(GenerationEngine):
    """Tells whose prompts were read in which pass, and waits for the test before the first."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.read: list[dict[str, int]] = []
        self.on_first: Callable[[], object] = lambda: None

    def _forward(self, plan: Any) -> Any:
        read: dict[str, int] = {}
        for request, count in plan.items():
            if request not in self._newest:
                read[request.owner] = read.get(request.owner, 0) + count
        self.read.append(read)
        if len(self.read) == 1:
            self.on_first()
        return super()._forward(plan)


def planned(base: BaseModel, settings: GenerationSettings) -> tuple[Planned, DeviceLock]:
    device_lock = DeviceLock()
    return Planned(base, {}, settings, device_lock), device_lock


PLAIN = ShiftUse(Mode.BASE)


def test_a_prompt_is_read_beside_any_number_of_another_devices(base: BaseModel) -> None:
    """A device's twelve long prompts were read before another's short one: in the order they came."""
    engine, device_lock = planned(base, GenerationSettings(4096, 32, 20))
    short: list[Iterator[Any]] = []
    engine.on_first = lambda: short.append(engine.submit([0] * 8, PLAIN, Sampling(2), "honest"))
    with device_lock.hold():  # nothing is read before all of these are there
        long = [engine.submit([0] * 100, PLAIN, Sampling(2), "greedy") for _ in range(12)]
    for answer in long:
        list(answer)
    list(short[0])
    assert ["honest" in read for read in engine.read[:3]] == [False, True, False]
    assert engine.read[1]["honest"] == 8
    engine.stop()


def test_places_in_the_cache_go_to_the_device_that_holds_least(base: BaseModel) -> None:
    engine, device_lock = planned(base, GenerationSettings(256, 32, 20))
    with device_lock.hold():
        greedy = [engine.submit([0] * 60, PLAIN, Sampling(4), "greedy") for _ in range(8)]
        honest = engine.submit([0] * 60, PLAIN, Sampling(4), "honest")
    list(honest)
    before = next(number for number, read in enumerate(engine.read) if "honest" in read)
    assert sum(read.get("greedy", 0) for read in engine.read[:before]) <= 3 * 60  # of eight that came first
    for answer in greedy:
        list(answer)
    engine.stop()


class Identity(str):
    """Of a device; tells when nobody knows it any more."""

    __slots__ = ("__weakref__",)


@pytest.mark.parametrize(
    ("kind", "alone"), [(GenerationEngine, False), (GenerationEngine, True), (BatchedEngine, False)]
)
def test_who_asked_is_forgotten_when_nobody_asks(base: BaseModel, kind: type[Engine], alone: bool) -> None:
    """Every identity stayed in memory as long as the process."""
    engine = kind(base, {}, GenerationSettings(1024, 32, 20, alone=alone))
    owners = [Identity(f"device {n}") for n in range(3)]
    known = [weakref.ref(owner) for owner in owners]
    for tokens in (1, 4):
        for answer in [engine.submit([0] * 40, PLAIN, Sampling(tokens), owner) for owner in owners]:
            list(answer)
    del owners, answer
    wait_for(lambda: not any(is_known() for is_known in known))
    engine.stop()


def test_who_took_a_step_is_forgotten(base: BaseModel, artefact: Artefact) -> None:
    steps = GradientScheduler(UpdateEngine(base, keep_bytes=2**20))
    owner = Identity("device")
    known = weakref.ref(owner)
    with steps.open([([5, 6, 7], [8])], artefact, owner=owner) as session:
        steps.submit(GradientRequest(session, [0], artefact.seed)).result(TIMEOUT)
    del owner, session
    wait_for(lambda: known() is None)
    steps.close()


class Owned:
    def __init__(self, owner: str) -> None:
        self.owner = owner


STEP = 1 / 64  # seconds of a pass without prompts


def test_prompts_wait_until_the_answers_of_others_had_as_much_time() -> None:
    reading, mine, theirs = PrefillScheduler(), Owned("a"), Owned("b")
    everybody = {"a", "b"}
    reading.done({}, STEP, decodes=True, owners=everybody)  # what a pass without prompts takes
    assert reading.order([mine], {"b"}) == [mine]
    reading.done({"a": 100}, 11 * STEP, decodes=True, owners=everybody)
    for _ in range(10):
        assert reading.order([mine], {"b"}) == []
        assert reading.order([mine], {"a"}) == [mine]  # its own answers wait for it, as they like
        assert reading.order([mine, theirs], everybody) == [theirs]
        reading.done({}, STEP, decodes=True, owners=everybody)
    assert reading.order([mine], {"b"}) == [mine]
    reading.done({"a": 100}, STEP, decodes=True, owners=everybody)  # a device with room to spare
    assert reading.order([mine], {"b"}) == [mine]
    reading.done({"a": 100}, 11 * STEP, decodes=True, owners={"a"})  # alone
    assert reading.order([mine], {"b"}) == [mine]


def test_everyone_on_one_device_gets_on(make_artefact: Callable[..., Any]) -> None:
    """Answers, stateless gradients, updates that open and updates that step: none stands still, or in
    another's way."""
    base, device_lock, done = build("llama"), DeviceLock(), threading.Event()
    artefact = make_artefact(base)
    engine, alone = (
        UpdateEngine(base, keep_bytes=PLENTY, device_lock=device_lock),
        GradientEngine(base, device_lock),
    )
    queue = GradientScheduler(engine)
    mine = person(artefact, 1)
    with engine.open(RAGGED, artefact) as session:
        (wanted,) = engine.gradients([GradientRequest(session, [2, 5], mine)])
    pairs, counts = [RAGGED[2], RAGGED[5]], {"answers": 0, "stateless": 0, "steps": 0}

    def answers() -> None:
        while not done.is_set():
            with device_lock.hold():
                counts["answers"] += 1

    def stateless() -> None:
        for _ in range(20):
            assert_equal(alone.gradient(pairs, ShiftUse(Mode.PERSONAL, artefact, mine)), wanted)
            counts["stateless"] += 1

    def steps() -> None:
        for _ in range(5):
            with queue.open(RAGGED, artefact) as own:
                for _ in range(4):
                    assert_equal(queue.submit(GradientRequest(own, [2, 5], mine)).result(TIMEOUT), wanted)
                    counts["steps"] += 1

    answering = threading.Thread(target=answers)
    answering.start()
    others = [threading.Thread(target=work) for work in (stateless, stateless, steps, steps)]
    for thread in others:
        thread.start()
    for thread in others:
        thread.join(TIMEOUT)
    done.set()
    answering.join(TIMEOUT)
    assert (counts["stateless"], counts["steps"]) == (40, 40)
    assert counts["answers"] > 100
    assert not device_lock.health().running and engine.bytes_held() == (0, 0)
    queue.close()
    alone.close()
