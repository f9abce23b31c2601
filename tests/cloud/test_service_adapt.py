"""Adapt over real TLS: one update over one stream."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import numpy as np
import pytest
from tests.support.adapt_calls import EXAMPLES, Stream, examples, mine, opening, step, wait_until_freed
from tests.support.cloud import TIMEOUT, Running, failure
from tests.support.waiting import wait_for

from perfit_cloud.engine.gradients.scheduler import GradientScheduler
from perfit_cloud.engine.gradients.session import UpdateEngine
from perfit_cloud.engine.gradients.stateless import GradientEngine
from perfit_cloud.engine.interface import Gradient, ShiftUse
from perfit_cloud.model.artefacts import Artefact
from perfit_cloud.model.base import BaseModel
from perfit_shared.shifts import ShiftTensors, gradient_from_bytes
from perfit_shared.types import Mode
from perfit_shared.wire import personalization_pb2 as pb


def wanted_of(
    engine: GradientEngine, base: BaseModel, artefact: Artefact, tensors: ShiftTensors, rows: Sequence[int]
) -> Gradient:
    pairs = [(base.encode(EXAMPLES[row][0]), base.encode_target(EXAMPLES[row][1])) for row in rows]
    return engine.gradient(pairs, ShiftUse(Mode.PERSONAL, artefact, tensors))


def assert_is(got: pb.AdaptResponse, wanted: Gradient, artefact: Artefact, tolerance: float = 2e-5) -> None:
    assert (got.loss, got.tokens) == (
        pytest.approx(wanted.loss, rel=max(1e-5, tolerance / 10)),
        wanted.tokens,
    )
    gradient = gradient_from_bytes(got.gradient, artefact.spec, artefact.spec.personal_rank)
    for (name, a), (_, b) in zip(gradient.named(), wanted.tensors.named(), strict=True):
        assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b) + 1e-7, name


def test_steps_equal_those_of_the_stateless_engine(
    run: Callable[..., Running],
    artefact: Artefact,
    base: BaseModel,
    gradients: GradientEngine,
    adaptations: UpdateEngine,
) -> None:
    running = run()
    call = Stream(running.device(), opening(artefact), examples(EXAMPLES[:2]), examples(EXAMPLES[2:]))
    for seed, rows in enumerate([[3, 0], [4, 1, 2], [2], [0, 1, 2, 3, 4]]):
        tensors = mine(artefact, seed)
        wanted = wanted_of(gradients, base, artefact, tensors, rows)
        assert_is(call.ask(step(tensors, rows)), wanted, artefact)
        loss = call.ask(step(tensors, rows, loss_only=True))
        assert (loss.loss, loss.tokens, loss.gradient) == (
            pytest.approx(wanted.loss, rel=1e-5),
            wanted.tokens,
            b"",
        )
        rounded = call.ask(step(tensors.to_bytes(dtype="float16"), rows))
        assert b'"F16"' in rounded.gradient
        assert_is(rounded, wanted, artefact, tolerance=2e-2)
    call.end()
    assert list(call.call) == []
    assert call.call.code() is grpc.StatusCode.OK
    wait_until_freed(adaptations)


def test_describe_tells_the_limits_and_what_is_kept(run: Callable[..., Running]) -> None:
    told = run(adapt_examples=7, adapt_tokens=900, questions=3).device().describe()
    assert (told.limits.adapt_examples, told.limits.adapt_tokens, told.limits.questions) == (7, 900, 3)
    assert told.keeps and told.continuous


def test_streams_side_by_side_equal_each_alone(
    run: Callable[..., Running],
    stream: Callable[..., Stream],
    artefact: Artefact,
    base: BaseModel,
    gradients: GradientEngine,
) -> None:
    running = run()
    streams = [stream(running.device()) for _ in range(3)]

    def work(who: int) -> list[tuple[pb.AdaptResponse, Gradient]]:
        found = []
        for at in range(6):
            tensors, rows = mine(artefact, 10 * who + at), [(who + at) % 5, (who + at + 2) % 5]
            got = streams[who].ask(step(tensors, rows))
            found.append((got, wanted_of(gradients, base, artefact, tensors, rows)))
        return found

    with ThreadPoolExecutor(3) as pool:
        for found in pool.map(work, range(3)):
            for got, wanted in found:
                assert_is(got, wanted, artefact)


@pytest.mark.parametrize("moment", ["idle", "filling", "in line"])
def test_a_caller_who_leaves_frees_everything(
    moment: str,
    run: Callable[..., Running],
    base: BaseModel,
    stream: Callable[..., Stream],
    artefact: Artefact,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = UpdateEngine(base, keep_bytes=2**26)
    steps = GradientScheduler(engine)
    there, go_on = threading.Event(), threading.Event()

    def slow(work: Callable[..., Any]) -> Callable[..., Any]:
        def held(*args: Any, **how: Any) -> Any:
            there.set()
            assert go_on.wait(TIMEOUT)
            return work(*args, **how)

        return held

    running = run(steps=steps)
    call, tensors = stream(running.device()), mine(artefact, 1)
    if moment == "filling":
        monkeypatch.setattr("perfit_cloud.engine.gradients.activation_cache._fill", slow(lambda *_: None))
        call.send(step(tensors, [0]))
        assert there.wait(TIMEOUT)
    else:
        call.ask(step(tensors, [0]))
        assert engine.bytes_held()[0] > 0
    if moment == "in line":
        monkeypatch.setattr(engine, "run_pass", slow(engine.run_pass))
        call.send(step(tensors, [0]))
        assert there.wait(TIMEOUT)
    call.call.cancel()
    if moment != "idle":
        time.sleep(0.2)  # the pass is still at work
        go_on.set()
    wait_until_freed(engine)
    steps.close()


def test_a_step_that_failed_leaves_nothing_behind(
    run: Callable[..., Running],
    base: BaseModel,
    stream: Callable[..., Stream],
    artefact: Artefact,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The tensors were held by the frames that its error went through, and those by its error."""
    engine, gone = UpdateEngine(base, keep_bytes=2**26), []
    steps = GradientScheduler(engine)

    def broken(shares: Any, **_: Any) -> None:
        gone.append(weakref.ref(shares[0][0].personal))
        raise ZeroDivisionError

    monkeypatch.setattr(engine, "run_pass", broken)
    call = stream(run(steps=steps).device())
    gc.disable()
    try:
        assert failure(lambda: call.ask(step(mine(artefact, 1), [0])))[:2] == (
            "INTERNAL",
            {"perfit-code": "internal"},
        )
        wait_for(lambda: gone[0]() is None, what="the tensors are gone")
    finally:
        gc.enable()
    steps.close()


def test_a_revoked_device_gets_no_further_response(
    run: Callable[..., Running], artefact: Artefact, stream: Callable[..., Stream], adaptations: UpdateEngine
) -> None:
    running = run()
    device = running.device()
    call = stream(device)
    call.ask(step(mine(artefact, 1), [0]))
    running.authority.revoke(device.identity)
    assert failure(lambda: call.ask(step(mine(artefact, 1), [0])))[:2] == (
        "PERMISSION_DENIED",
        {"perfit-code": "identity_revoked"},
    )
    wait_until_freed(adaptations)


def test_a_server_that_stops_ends_its_streams(
    run: Callable[..., Running], artefact: Artefact, stream: Callable[..., Stream], adaptations: UpdateEngine
) -> None:
    running = run()
    call = stream(running.device())
    call.ask(step(mine(artefact, 1), [0]))
    running.server.stop(0)
    assert failure(lambda: call.ask(step(mine(artefact, 1), [0])))[0] in {"UNAVAILABLE", "CANCELLED"}
    wait_until_freed(adaptations)
