"""An update over Adapt streams of a real server: whatever becomes of them, it ends where it would."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.support.adapt_calls import wait_until_freed
from tests.support.cloud import Running
from tests.support.updating import KEEP, Parts, Watched, assert_near, enrolled, split_of
from tests.support.waiting import wait_for

from perfit_cloud.engine.gradients.session import UpdateEngine
from perfit_device import evaluation
from perfit_device.cloud.client import Cloud
from perfit_device.cloud.codec import ShiftUse
from perfit_device.history import HistoryItem
from perfit_device.nearest import NearestExamples
from perfit_device.training import gradients as adapting
from perfit_device.training.gradients import GradientSource
from perfit_shared.errors import Busy, ExamplesRefused, InvalidInput, PerfitError, TooSlow, Unavailable
from perfit_shared.shifts import ShiftTensors
from perfit_shared.validation import mean_loss


@pytest.fixture
def parts(
    run: Callable[..., Running], base: Any, artefact: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Parts]:
    engine = UpdateEngine(base, keep_bytes=KEEP)
    queue = Watched(engine)
    running = run(steps=queue)
    with Cloud(enrolled(running)) as cloud:
        made = Parts(running, engine, queue, cloud, cloud.describe(), split_of(artefact), tmp_path)
        stream = cloud.stream

        def counted(method: str, *args: Any) -> Any:
            made.streams.append(method)
            return stream(method, *args)

        monkeypatch.setattr(cloud, "stream", counted)
        yield made
    queue.hold.set()
    queue.close()


@pytest.fixture
def call_by_call(parts: Parts) -> ShiftTensors:
    with parts.adapting(adapt_examples=0) as source:
        tensors = parts.update(source, "alone.db")
    assert not parts.streams and not parts.queue.asked
    return tensors


def test_an_update_over_a_stream_ends_as_call_by_call(
    parts: Parts, call_by_call: ShiftTensors, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One stream for all of it, the gate's losses included; its examples in several messages."""
    monkeypatch.setattr(adapting, "_MESSAGE_BYTES", 150)
    with parts.adapting() as source:
        tensors = parts.update(source, "stream.db")
    assert (parts.streams, parts.queue.opened, parts.queue.asked) == (["Adapt"], 1, 12 + 3 + 1)
    assert_near(tensors, call_by_call, parts.cloud.fetch_seed(parts.artefact))


@pytest.mark.slow
@pytest.mark.parametrize(
    "error", [TooSlow("over its time"), Unavailable("stopping"), Busy("busy"), InvalidInput("no")]
)
def test_an_update_whose_stream_breaks_ends_as_call_by_call(
    parts: Parts, call_by_call: ShiftTensors, error: PerfitError
) -> None:
    """It breaks at a step, and again at a judgement; where waiting may help, another is tried each epoch."""
    parts.queue.fail = {3: error, 9: error}
    with parts.adapting() as source:
        tensors = parts.update(source, "broken.db")
    assert_near(tensors, call_by_call, parts.cloud.fetch_seed(parts.artefact))
    # Its third step fails; then it holds from the first judgement to the second.
    assert parts.streams == (["Adapt"] if type(error) is InvalidInput else ["Adapt"] * 3)
    assert parts.queue.opened == len(parts.streams)


def test_a_place_that_is_taken_is_asked_for_again_after_an_epoch(parts: Parts) -> None:
    with parts.adapting() as first, parts.adapting() as second:
        tensors = parts.cloud.fetch_seed(parts.artefact)
        parts.queue.fail = {2: Busy("busy")}
        first.gradient([0], tensors)()
        wanted = first.gradient([1], tensors)()  # broken off, and done call by call
        assert second.gradient([1], tensors)()[:2] == (pytest.approx(wanted[0], rel=1e-4), wanted[1])
        assert parts.streams == ["Adapt"] * 2
        first.gradient([2], tensors)()
        assert parts.streams == ["Adapt"] * 2
        parts.gate_loss(first, tensors)
        first.gradient([2], tensors)()
        assert parts.streams == ["Adapt"] * 3


def test_what_stands_before_examples_is_read_alike_over_a_stream_and_call_by_call(parts: Parts) -> None:
    """It is as if it were a part of their prompts; and it matters."""
    seed, rows = parts.cloud.fetch_seed(parts.artefact), [0, 3, len(parts.split.train)]
    near = NearestExamples(parts.artefact.task, parts.split.train, 2, tokens=64)
    assert {len(near.before(item)) for item in (*parts.split.train, *parts.split.gate)} == {2}
    found = []
    for how in ({"before": near.before}, {"before": near.before, "adapt_examples": 0}, {}):
        with parts.adapting(**how) as source:
            loss, tokens, gradient = source.gradient(rows[:2], seed)()
            found.append((loss, tokens, gradient, source.scores(rows, seed)()))
    assert parts.streams == ["Adapt", "Adapt"], "and one is call by call"
    streamed, alone, plain = found
    assert streamed[:2] == (pytest.approx(alone[0], rel=1e-4), alone[1]) and streamed[1] == plain[1]
    assert_near(streamed[2], alone[2], plain[2])
    losses = [[score.log_likelihood for score in scores] for *_, scores in found]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert all(abs(a - b) > 1e-3 for a, b in zip(losses[0], losses[2], strict=True))


def alter_received(monkeypatch: pytest.MonkeyPatch, alter: Callable[[Any], object]) -> None:
    """Change what comes along a stream before the device reads it."""
    receive = adapting._AdaptStream.receive

    def altered(stream: Any) -> Any:
        response = receive(stream)
        alter(response)
        return response

    monkeypatch.setattr(adapting._AdaptStream, "receive", altered)


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_no_number_is_asked_for_call_by_call(
    parts: Parts, monkeypatch: pytest.MonkeyPatch, loss: float
) -> None:
    """It kept every epoch out of the gate, and the whole update was thrown away."""
    seed = parts.cloud.fetch_seed(parts.artefact)
    with parts.adapting() as source:
        wanted = parts.gate_loss(source, seed)

    def alter(response: Any) -> None:
        response.scores[0].log_likelihood = loss

    alter_received(monkeypatch, alter)
    with parts.adapting() as source:
        assert parts.gate_loss(source, seed) == pytest.approx(wanted, rel=1e-5)
    assert parts.streams == ["Adapt"] * 2


def test_the_losses_are_those_of_score(parts: Parts) -> None:
    seed = parts.cloud.fetch_seed(parts.artefact)
    with parts.adapting() as source:
        found = parts.gate_loss(source, seed)
    assert parts.streams == ["Adapt"]
    client = evaluation.TaskClient(parts.cloud, parts.artefact.task, parts.info.limits)
    wanted = client.all_scores(parts.split.gate, ShiftUse(parts.artefact, seed))
    assert found == pytest.approx(mean_loss(wanted), rel=1e-5)


def test_a_cloud_that_sends_no_scores_along_a_stream_is_asked_for_them(
    parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    seed = parts.cloud.fetch_seed(parts.artefact)
    with parts.adapting() as source:
        wanted = parts.gate_loss(source, seed)
    alter_received(monkeypatch, lambda response: response.ClearField("scores"))
    with parts.adapting() as source:
        assert parts.gate_loss(source, seed) == pytest.approx(wanted, rel=1e-5)
        source.gradient([0], seed)()
    assert (parts.streams, parts.queue.asked) == (["Adapt"] * 2, 3), (
        "the stream stays, and the step goes along"
    )


def test_a_stream_that_breaks_fails_every_step_that_was_sent(parts: Parts) -> None:
    """The folds of a round are sent together; whoever waited behind the first error waited for ever."""
    seed = parts.cloud.fetch_seed(parts.artefact)
    with parts.adapting() as source:
        source.gradient([0], seed)()
        parts.queue.hold.clear()
        waiting = [source.gradient([row], seed) for row in range(3)]
        assert source._stream is not None
        source._stream._responses.close()
        parts.queue.hold.set()
        assert [answer()[1] > 0 for answer in waiting] == [True] * 3


def test_an_example_that_the_cloud_refuses_is_named_before_the_first_step(parts: Parts) -> None:
    """It was named once it was trained on, after the steps before it."""
    fields = {"text": "cat " * 300, "title": "a dog"}
    too_long = HistoryItem.make(parts.artefact.task, fields)
    for part in ("train", "gate"):
        items = (*getattr(parts.split, part), too_long)
        split = replace(parts.split, **{part: items})
        with GradientSource(parts.cloud, parts.artefact, parts.info.limits, split) as source:
            seed = parts.cloud.fetch_seed(parts.artefact)
            with pytest.raises(ExamplesRefused, match=f"perfit history forget {too_long.short}") as raised:
                source.gradient([0], seed)()
            assert raised.value.names == (too_long.name,)
            with pytest.raises(ExamplesRefused):  # call by call
                if part == "gate":
                    source.scores([len(split.train), len(split.train) + len(items) - 1], seed)()
                else:
                    source.gradient([0, len(items) - 1], seed)()
    assert not parts.queue.opened


def test_a_history_beyond_the_clouds_limit_goes_call_by_call(parts: Parts) -> None:
    most = len(parts.split.train) + len(parts.split.gate)
    seed = parts.cloud.fetch_seed(parts.artefact)
    for limit, streams in ((most - 1, []), (most, ["Adapt"])):
        with parts.adapting(adapt_examples=limit) as source:
            source.gradient([0], seed)()
        assert parts.streams == streams


def test_a_silent_cloud_is_not_waited_for(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    seed = parts.cloud.fetch_seed(parts.artefact)
    with parts.adapting() as source:
        source.gradient([0], seed)()
        parts.queue.hold.clear()
        with monkeypatch.context() as patch:
            patch.setattr(adapting, "_STEP_SECONDS", 0.1)
            assert source.gradient([0], seed)()[1] > 0
        parts.queue.hold.set()
        assert parts.gate_loss(source, seed) > 0
    assert parts.streams == ["Adapt"] * 2, "it had opened fast enough"


def test_a_cloud_too_slow_to_open_is_not_tried_again(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    """It worked through all examples anew at every epoch, to be left each time."""
    monkeypatch.setattr(adapting, "_FIRST_SECONDS", 0.1)
    parts.queue.hold.clear()
    seed = parts.cloud.fetch_seed(parts.artefact)
    with parts.adapting() as source:
        assert source.gradient([0], seed)()[1] > 0
        for _ in range(2):
            assert parts.gate_loss(source, seed) > 0
            assert source.gradient([1], seed)()[1] > 0
    assert parts.streams == ["Adapt"]


@pytest.mark.parametrize("folds", [0, 3])
@pytest.mark.parametrize("limits", [{}, {"adapt_examples": 0}])
def test_the_gate_sees_its_own_part_alone(
    parts: Parts, limits: dict[str, int], folds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it goes over the wire: what trains never judges, what judges never trains; neither sees the test."""
    trained, judged = set(), set()
    stream, gradient, score = parts.cloud.stream, parts.cloud.compute_gradient, parts.cloud.score

    def streamed(method: str, requests: Iterator[Any], seconds: float) -> Any:
        def seen() -> Iterator[Any]:
            sent: list[tuple[str, str]] = []
            for request in requests:
                sent += [(e.prompt.text, e.target) for e in request.examples.examples]
                for row in request.step.rows:
                    (judged if request.step.loss_only else trained).add(sent[row])
                yield request

        return stream(method, seen(), seconds)

    def alone(examples: Any, *args: Any) -> Any:
        trained.update(examples)
        return gradient(examples, *args)

    def scored(candidates: Any, *args: Any) -> Any:
        judged.update(candidates)
        return score(candidates, *args)

    monkeypatch.setattr(parts.cloud, "stream", streamed)
    monkeypatch.setattr(parts.cloud, "compute_gradient", alone)
    monkeypatch.setattr(parts.cloud, "score", scored)
    with parts.adapting(**limits) as source:
        parts.update(source, "gate.db", folds=folds)
    assert bool(parts.streams) is not bool(limits)
    pairs = [
        {evaluation.pair_of(parts.artefact.task, item) for item in part}
        for part in (parts.split.train, parts.split.gate, parts.split.test)
    ]
    if folds:
        assert trained == judged == pairs[0] | pairs[1]
    else:
        assert [trained, judged] == pairs[:2]
    assert sum(map(len, pairs)) == len(set.union(*pairs)) == 24


def test_leaving_ends_the_stream(parts: Parts) -> None:
    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt), parts.adapting() as source:
        seed = parts.cloud.fetch_seed(parts.artefact)
        source.gradient([0], seed)()
        assert parts.engine.bytes_held()[0] > 0
        source.gradient([1], seed)  # in flight
        raise KeyboardInterrupt
    wait_until_freed(parts.engine)
    wait_for(lambda: threading.active_count() <= before + 2, what="the threads of the stream ended")
