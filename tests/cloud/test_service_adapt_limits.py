"""Bounds of Adapt: what no stream may say, places and shares of them, and callers who say or read nothing."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from tests.support.adapt_calls import EXAMPLES, Stream, examples, mine, opening, step, wait_until_freed
from tests.support.cloud import INVALID, TIMEOUT, Running, failure

from perfit_cloud.engine.gradients.scheduler import GradientScheduler
from perfit_cloud.engine.gradients.session import UpdateEngine
from perfit_cloud.model.artefacts import Artefact
from perfit_cloud.service import interceptor as guard
from perfit_cloud.service import listeners
from perfit_cloud.service.streams import adapt
from perfit_shared.wire import personalization_pb2 as pb

Hostile = Callable[[Artefact], list[pb.AdaptRequest]]
HOSTILE: dict[str, tuple[str, str, str, Hostile]] = {
    "steps before open": (INVALID, "invalid_input", "one open", lambda a: [step(mine(a, 1), [0])]),
    "examples before open": (INVALID, "invalid_input", "one open", lambda a: [examples(EXAMPLES)]),
    "nothing": (INVALID, "invalid_input", "one open", lambda a: []),
    "an empty message": (INVALID, "invalid_input", "one open", lambda a: [pb.AdaptRequest()]),
    "open twice": (INVALID, "invalid_input", "one open", lambda a: [opening(a), opening(a)]),
    "a step before examples": (
        INVALID,
        "invalid_input",
        "then examples",
        lambda a: [opening(a), step(mine(a, 1), [0])],
    ),
    "half-closed before a step": (
        INVALID,
        "invalid_input",
        "then steps",
        lambda a: [opening(a), examples(EXAMPLES)],
    ),
    "no examples": (INVALID, "invalid_input", "should hold some", lambda a: [opening(a), examples([])]),
    "examples after a step": (
        INVALID,
        "invalid_input",
        "then steps",
        lambda a: [opening(a), examples(EXAMPLES), step(mine(a, 1), [0]), examples(EXAMPLES)],
    ),
    "another artefact": ("NOT_FOUND", "not_found", "there are", lambda a: [opening(a, artefact="other")]),
    "another version": (
        "FAILED_PRECONDITION",
        "shift_mismatch",
        "perfit update",
        lambda a: [opening(a, version="0")],
    ),
    "too many examples": (
        INVALID,
        "invalid_input",
        "at most 6 examples",
        lambda a: [opening(a), *[examples(EXAMPLES)] * 2, step(mine(a, 1), [0])],
    ),
    "too many tokens": (
        INVALID,
        "invalid_input",
        "300 tokens together",
        lambda a: [opening(a), *[examples([("cat dog " * 30, " ran")] * 2)] * 3, step(mine(a, 1), [0])],
    ),
    "an example too long": (
        INVALID,
        "invalid_prompt",
        "example 4: ",
        lambda a: [opening(a), examples(EXAMPLES[:2]), examples([EXAMPLES[2], ("cat " * 300, " ran")])],
    ),
    "an example without a target": (
        INVALID,
        "invalid_prompt",
        "example 2: ",
        lambda a: [opening(a), examples([EXAMPLES[0], ("a", " ")])],
    ),
    "no rows": (
        INVALID,
        "invalid_input",
        "0 to 4",
        lambda a: [opening(a), examples(EXAMPLES), step(mine(a, 1), [])],
    ),
    "rows out of range": (
        INVALID,
        "invalid_input",
        "0 to 4",
        lambda a: [opening(a), examples(EXAMPLES), step(mine(a, 1), [4, 5])],
    ),
    "a row twice": (
        INVALID,
        "invalid_input",
        "distinct",
        lambda a: [opening(a), examples(EXAMPLES), step(mine(a, 1), [1, 1])],
    ),
    "garbage for tensors": (
        INVALID,
        "invalid_tensors",
        "safetensors",
        lambda a: [opening(a), examples(EXAMPLES), step(b"\x08" + bytes(400), [0])],
    ),
    "no tensors": (
        INVALID,
        "invalid_tensors",
        "safetensors",
        lambda a: [opening(a), examples(EXAMPLES), step(b"", [0])],
    ),
    "tensors of another spec": (
        INVALID,
        "invalid_tensors",
        "",
        lambda a: [opening(a), examples(EXAMPLES), step(a.collective, [0])],
    ),
}


def test_hostile_streams_get_their_one_clear_error(
    run: Callable[..., Running], stream: Callable[..., Stream], artefact: Artefact, adaptations: UpdateEngine
) -> None:
    """And harm nobody: a stream that was there before goes on as if nothing had been."""
    running = run(adapt_examples=6, adapt_tokens=300)
    device, tensors = running.device(), mine(artefact, 2)
    honest = stream(running.device())
    before = honest.ask(step(tensors, [0, 3]))
    for name, (status, code, text, messages) in HOSTILE.items():
        found = failure(lambda m=messages: list(device.stub.Adapt(iter(m(artefact)), timeout=TIMEOUT)))
        assert (found[0], found[1]) == (status, {"perfit-code": code}), name
        assert text in found[2], name
        assert "cat" not in found[2], name
    assert honest.ask(step(tensors, [0, 3])) == before
    honest.end()
    assert list(honest.call) == []
    wait_until_freed(adaptations)


def test_bytes_that_are_no_message_end_their_stream_alone(
    run: Callable[..., Running], stream: Callable[..., Stream], artefact: Artefact
) -> None:
    running = run()
    honest = stream(running.device())
    raw = running.device().channel.stream_stream("/perfit.v1.Personalization/Adapt")
    assert failure(lambda: list(raw(iter([b"\xff" * 50]), timeout=TIMEOUT)))[:2] == (
        INVALID,
        {"perfit-code": "invalid_input"},
    )
    assert honest.ask(step(mine(artefact, 1), [0])).tokens > 0


def test_streams_beyond_the_places_come_back_later(
    run: Callable[..., Running], stream: Callable[..., Stream], artefact: Artefact
) -> None:
    running = run(adaptations=1, retry_ms=750)
    device = running.device()
    first = stream(device)
    first.ask(step(mine(artefact, 1), [0]))
    status, metadata, _ = failure(lambda: stream(device).ask())
    assert (status, metadata) == ("RESOURCE_EXHAUSTED", {"perfit-code": "busy", "perfit-retry-ms": "750"})
    first.end()
    assert list(first.call) == []
    assert stream(device).ask(step(mine(artefact, 1), [0])).tokens > 0


@pytest.mark.parametrize("silent", ["from the start", "after a step"])
def test_a_silent_stream_does_not_hold_its_place(
    silent: str,
    run: Callable[..., Running],
    artefact: Artefact,
    stream: Callable[..., Stream],
    step_queue: GradientScheduler,
    adaptations: UpdateEngine,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    submit = step_queue.submit

    def hurried(*args: Any, **how: Any) -> Any:
        monkeypatch.setattr(adapt, "_IDLE_SECONDS", 0.1)
        return submit(*args, **how)

    running = run()
    if silent == "after a step":
        monkeypatch.setattr(step_queue, "submit", hurried)
        call = stream(running.device())
        call.ask(step(mine(artefact, 1), [0]))
    else:
        monkeypatch.setattr(adapt, "_IDLE_SECONDS", 0.1)
        call = stream(running.device())
    status, metadata, text = failure(call.ask)
    assert (status, metadata) == ("DEADLINE_EXCEEDED", {"perfit-code": "too_slow"})
    assert "open another stream" in text
    wait_until_freed(adaptations)


def test_no_stream_lasts_for_ever(
    run: Callable[..., Running], artefact: Artefact, stream: Callable[..., Stream], adaptations: UpdateEngine
) -> None:
    running = run(stream_seconds=1)
    call = stream(running.device())

    def go_on() -> None:
        for _ in range(200):
            call.ask(step(mine(artefact, 1), [0]))
            time.sleep(0.02)

    status, metadata, text = failure(go_on)
    assert (status, metadata) == ("DEADLINE_EXCEEDED", {"perfit-code": "too_slow"})
    assert "open another" in text
    wait_until_freed(adaptations)


@pytest.mark.slow
def test_a_caller_who_does_not_read_is_cut_off(
    run: Callable[..., Running],
    artefact: Artefact,
    stream: Callable[..., Stream],
    adaptations: UpdateEngine,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """gRPC's send held the call, its place and all that it kept, for as long as the caller liked."""
    sent = threading.Event()

    def big(*_: object, **__: object) -> pb.AdaptResponse:
        sent.set()
        return pb.AdaptResponse(gradient=bytes(5_000_000))  # more than all buffers on the way take

    monkeypatch.setattr(guard, "_LATE_SECONDS", 0.5)
    monkeypatch.setattr(listeners, "_GRACE_SECONDS", 10 * TIMEOUT)  # or the connection's end would do it
    running = run(adaptations=1, stream_seconds=3)
    unread, other = stream(running.device()), running.device()
    with monkeypatch.context() as patch:
        patch.setattr(adapt, "encode_step", big)
        unread.send(step(mine(artefact, 1), [0]))
        assert sent.wait(TIMEOUT)
    assert failure(lambda: stream(other).ask(step(mine(artefact, 1), [0])))[0] == "RESOURCE_EXHAUSTED"
    wait_until_freed(adaptations)
    assert unread.call.is_active(), "and not by its own deadline"
    assert stream(other).ask(step(mine(artefact, 1), [0])).tokens > 0


def test_one_device_leaves_room_for_the_others(
    run: Callable[..., Running], stream: Callable[..., Stream], artefact: Artefact
) -> None:
    running = run(adaptations=3, adaptations_each=2, retry_ms=750)
    device = running.device()
    held = [stream(device), stream(running.with_certificate(device.key, device.certificate))]
    for each in held:
        each.ask(step(mine(artefact, 1), [0]))
    status, metadata, text = failure(lambda: stream(device).ask())
    assert (status, metadata) == ("RESOURCE_EXHAUSTED", {"perfit-code": "busy", "perfit-retry-ms": "750"})
    assert "this device" in text
    assert stream(running.device()).ask(step(mine(artefact, 1), [0])).tokens > 0
    held[0].end()
    assert list(held[0].call) == []
    assert stream(device).ask(step(mine(artefact, 1), [0])).tokens > 0
