"""An adaptation from opening to close: the room it takes, what its passes run, and that nothing is left."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
from tests.support.gradients import PLENTY, RAGGED, assert_equal, person
from tests.support.models import build
from tests.support.waiting import SECONDS, wait_for

from perfit_cloud.engine.device_lock import DeviceLock
from perfit_cloud.engine.gradients import activation_cache as cache_module
from perfit_cloud.engine.gradients import session as module
from perfit_cloud.engine.gradients.batch import BatchBudget
from perfit_cloud.engine.gradients.example_cache import ON_DEVICE
from perfit_cloud.engine.gradients.session import GradientRequest, UpdateEngine
from perfit_cloud.engine.interface import Gradient
from perfit_cloud.model.blocks import block_list
from perfit_shared.errors import InvalidInput, InvalidTensors
from perfit_shared.shifts import LayerShift, ShiftTensors


@pytest.fixture
def llama(make_artefact: Any) -> Any:
    """(base, artefact with last positions, engine that keeps everything)."""
    base = build("llama")
    engine = UpdateEngine(base, keep_bytes=PLENTY)
    yield base, make_artefact(base, positions="l4"), engine
    engine.close()


def test_a_step_runs_only_what_the_tensors_can_change(llama: Any) -> None:
    """Rows that meet each block and its MLP: none below the first intervened one, no past, few at the end."""
    _, artefact, engine = llama
    session = engine.open(RAGGED, artefact)
    blocks = block_list(engine._decoder._decoder)
    seen: dict[str, int] = {}
    for at, block in enumerate(blocks):
        for name, part in (("attention", block.self_attn.q_proj), ("mlp", block.mlp)):
            part.register_forward_pre_hook(
                lambda _m, args, key=f"{name} {at}": seen.update({key: args[0].shape[1]})
            )
    engine.gradients([GradientRequest(session, [2, 5], person(artefact, 1))])  # layers 1 and 2, l4
    targets = [len(RAGGED[row][1]) for row in (2, 5)]
    rows = sum(4 + n - 1 for n in targets)
    assert seen == {"attention 2": rows, "mlp 2": rows, "attention 3": rows, "mlp 3": sum(targets)}


def test_nothing_is_left_after_close(make_artefact: Any) -> None:
    base = build("llama")
    artefact = make_artefact(base, positions="l4")
    engine = UpdateEngine(base, keep_bytes=6000, spill_bytes=9000)
    session = engine.open(RAGGED, artefact)
    held, taken = [session.arrays.ids], []
    for cache in caches_of(session):
        held += (own := [cache.hidden, *(t for pair in cache.past.values() for t in pair)])
        taken.append(sum(t.nbytes for t in own))
    assert all(tensor.abs().sum() > 0 for tensor in held)
    assert taken == session.cached_bytes
    assert list(engine.bytes_held()) == taken
    step = GradientRequest(session, [0, 1], person(artefact, 1))
    engine.gradients([step])
    session.close()
    session.close()
    assert not any(tensor.abs().sum() for tensor in held)
    assert not session.constants.any()
    assert engine.bytes_held() == (0, 0)
    for call in (engine.gradients, engine.losses):
        for late in (step, GradientRequest(session, [4], step.personal)):  # the other needs no pass
            with pytest.raises(InvalidInput, match="closed"):
                call([late])


def test_an_adaptation_closed_while_it_opens_holds_nothing(
    llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, artefact, engine = llama
    compute, made = module.build_cache, []

    def build(*arguments: Any, **how: Any) -> Any:
        made.append(compute(*arguments, **how))
        engine.close()
        return made[0]

    monkeypatch.setattr(module, "build_cache", build)
    with pytest.raises(InvalidInput, match="closed"):
        engine.open(RAGGED, artefact)
    assert not made[0].hidden.any()
    assert engine.bytes_held() == (0, 0)


def test_no_pass_begins_for_one_who_left(make_artefact: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """However much there is to fill: the passes after the caller has left are not run."""
    base = build("llama")
    artefact, left = make_artefact(base, positions="l4"), threading.Event()
    engine = UpdateEngine(base, keep_bytes=PLENTY)
    engine.budget = BatchBudget(30, 2**20, 2**20)
    fill, passes = cache_module._fill, []

    def filled(decoder: Any, part: Any, collective: Any) -> None:
        passes.append(part.cache)
        fill(decoder, part, collective)
        left.set()

    monkeypatch.setattr(cache_module, "_fill", filled)
    with pytest.raises(InvalidInput, match="closed"):
        engine.open(RAGGED, artefact, left=left)
    assert len(passes) == 1
    assert not passes[0].hidden.any()
    assert engine.bytes_held() == (0, 0)


def test_close_waits_for_the_pass_at_work(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _, artefact, engine = llama
    mine, theirs = engine.open(RAGGED, artefact), engine.open(RAGGED, artefact)
    at_work, go_on, compute = threading.Event(), threading.Event(), module.pass_from_cache

    def slow(*arguments: Any) -> Any:
        at_work.set()
        assert go_on.wait(SECONDS)
        return compute(*arguments)

    monkeypatch.setattr(module, "pass_from_cache", slow)
    found: list[Gradient] = []
    step = GradientRequest(mine, [2, 5], person(artefact, 1))
    worker = threading.Thread(target=lambda: found.extend(engine.gradients([step])))
    worker.start()
    assert at_work.wait(SECONDS)
    theirs.close()  # no part of the pass, so nothing to wait for
    closing = threading.Thread(target=mine.close)
    closing.start()
    closing.join(0.05)
    assert closing.is_alive() and all(cache.hidden.any() for cache in caches_of(mine)[:1])
    go_on.set()
    worker.join(10)
    closing.join(10)
    assert not closing.is_alive() and not caches_of(mine)
    assert np.isfinite(found[0].loss)


def test_passes_breathe_between_blocks(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Filling, a step and its backward pass each let others in; with nobody waiting they only look."""
    _, artefact, engine = llama
    breaths: list[str] = []
    doing = ""
    monkeypatch.setattr(DeviceLock, "yield_to_waiting", lambda _self: breaths.append(doing))
    doing = "fill"
    session = engine.open(RAGGED, artefact)
    step = GradientRequest(session, [2, 5], person(artefact, 1))
    doing = "loss"
    engine.losses([step])
    doing = "gradient"
    engine.gradients([step])
    # Layers 1 and 2 of 4, l4. Filling: all four for a prompt that nothing changes, two for rows and the
    # third for the past. The last block of a part is cut short, and does not count.
    assert {name: breaths.count(name) for name in breaths} == {"fill": 7, "loss": 1, "gradient": 2}


def test_an_adaptation_that_fails_to_open_holds_no_room(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _, artefact, engine = llama
    monkeypatch.setattr(module, "build_cache", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        engine.open(RAGGED, artefact)
    assert engine.bytes_held() == (0, 0)


def test_the_next_one_gets_the_room_that_a_closed_one_had(make_artefact: Any) -> None:
    base = build("llama")
    artefact = make_artefact(base, positions="l4")
    probe = UpdateEngine(base, keep_bytes=PLENTY)
    engine = UpdateEngine(base, keep_bytes=probe.open(RAGGED, artefact).cached_bytes[ON_DEVICE])
    with engine.open(RAGGED, artefact, owner="a") as first:
        assert first.cache.count(ON_DEVICE) == 7
        assert engine.open(RAGGED, artefact, owner="a").cache.count(ON_DEVICE) == 0
    assert engine.open(RAGGED, artefact, owner="a").cache.count(ON_DEVICE) == 7


def test_who_comes_later_takes_of_who_has_more_than_an_even_part(make_artefact: Any) -> None:
    """Two idle streams of one device held 99.8 % of the room, and everybody else's steps began anew."""
    base = build("llama")
    artefact = make_artefact(base, positions="l4")
    engine = UpdateEngine(base, keep_bytes=PLENTY)
    engine.budget = BatchBudget(40, 2**20, 2**20)  # so that a small adaptation has several blocks
    with engine.open(RAGGED, artefact) as probe:
        whole = probe.cached_bytes[ON_DEVICE]
    room = int(1.1 * whole)
    engine = UpdateEngine(base, keep_bytes=room)
    engine.budget = BatchBudget(40, 2**20, 2**20)
    greedy = [engine.open(RAGGED, artefact, owner="greedy") for _ in range(2)]
    step = GradientRequest(greedy[0], [2, 5], person(artefact, 1))
    (wanted,) = engine.gradients([step])
    kept = caches_of(greedy[0])
    assert engine.bytes_held()[0] > 0.9 * room
    late = engine.open(RAGGED, artefact, owner="late")
    assert 0.3 * room < late.cached_bytes[ON_DEVICE] <= room // 2
    assert engine.bytes_held()[0] <= room
    dropped = [each for each in kept if not each.hidden.any()]
    assert dropped and len(dropped) == len(kept) - len(caches_of(greedy[0]))
    (again,) = engine.gradients([step])
    assert_equal(again, wanted)
    # Nobody takes of who has no more than an even part.
    before = late.cached_bytes[ON_DEVICE]
    engine.open(RAGGED, artefact, owner="greedy")
    assert late.cached_bytes[ON_DEVICE] == before
    engine.close()
    assert engine.bytes_held() == (0, 0)


def test_who_comes_later_takes_no_more_than_it_wants(make_artefact: Any) -> None:
    """One short example freed up to half of what another device's update kept."""
    base = build("llama")
    artefact = make_artefact(base, positions="l4")
    probe = UpdateEngine(base, keep_bytes=PLENTY)
    engine = UpdateEngine(base, keep_bytes=probe.open(RAGGED, artefact).cached_bytes[ON_DEVICE])
    engine.budget = BatchBudget(15, 2**20, 2**20)
    first = engine.open(RAGGED, artefact, owner="first")
    kept = len(caches_of(first))
    late = engine.open(RAGGED[2:3], artefact, owner="late")
    assert (late.cache.count(ON_DEVICE), kept - len(caches_of(first))) == (1, 1)
    engine.close()


def test_whoever_leaves_stands_in_line_for_room_no_more(make_artefact: Any) -> None:
    base = build("llama")
    artefact = make_artefact(base, positions="l4")
    device_lock, left = DeviceLock(), threading.Event()
    engine = UpdateEngine(base, keep_bytes=1, device_lock=device_lock)
    plain = [pair for pair in RAGGED if len(pair[0]) > 4][:1]  # nothing that is computed before there is room
    opened: list[Exception] = []

    def open_it() -> None:
        try:
            engine.open(plain, artefact, left=left)
        except Exception as error:
            opened.append(error)

    with device_lock.hold_long():
        worker = threading.Thread(target=open_it)
        worker.start()
        wait_for(lambda: device_lock.health().waiting == 1)
        left.set()
        worker.join(10)
        assert [type(error) for error in opened] == [InvalidInput]
    engine.close()


def test_without_room_for_anybody_nobody_waits_for_it(make_artefact: Any) -> None:
    base = build("llama")
    device_lock = DeviceLock()
    engine = UpdateEngine(base, keep_bytes=0, device_lock=device_lock)
    opening = threading.Thread(
        target=engine.open, args=(RAGGED[2:3], make_artefact(base, positions="l4")), daemon=True
    )
    with device_lock.hold_long():
        opening.start()
        opening.join(10)
        assert not opening.is_alive()
    engine.close()


def caches_of(session: Any) -> list[Any]:
    return [block.activations for block in session.cache.blocks.values()]


def test_steps_from_many_threads(llama: Any) -> None:
    _, artefact, engine = llama
    session = engine.open(RAGGED, artefact)
    steps = [GradientRequest(session, [i, 7 - i], person(artefact, i)) for i in (0, 1, 2)]
    wanted = [engine.gradients([step])[0] for step in steps]
    found: dict[int, list[Gradient]] = {i: [] for i in range(3)}

    def work(i: int) -> None:
        with engine.open(RAGGED, artefact) as own:
            for _ in range(5):
                found[i] += engine.gradients([GradientRequest(own, steps[i].rows, steps[i].personal)])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(3):
        assert len(found[i]) == 5
        for got in found[i]:
            assert_equal(got, wanted[i])


def test_what_cannot_be_is_refused(llama: Any) -> None:
    _, artefact, engine = llama
    for examples in ([], [([], [5])], [([5, 6], [])]):
        with pytest.raises(InvalidInput):
            engine.open(examples, artefact)
    session, mine = engine.open(RAGGED, artefact), person(artefact, 1)
    for rows in ([], [8], [-1, 2]):
        with pytest.raises(InvalidInput, match="examples"):
            engine.gradients([GradientRequest(session, rows, mine)])
    narrow = {at: LayerShift(r[:2], w[:2], b[:2]) for at, (r, w, b) in mine.layers.items()}
    fewer = {1: mine.layers[1]}
    for layers in (narrow, fewer):
        with pytest.raises(InvalidTensors, match="shapes"):
            engine.gradients(
                [GradientRequest(session, [0], mine), GradientRequest(session, [0], ShiftTensors(layers))]
            )
