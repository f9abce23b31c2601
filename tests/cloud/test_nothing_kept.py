"""Nobody keeps anything of a call that ended, however it ended."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
import torch
from google.protobuf.message import Message
from tests.support.adapt_calls import EXAMPLES, examples, mine, step
from tests.support.adapt_calls import opening as adapt_opening
from tests.support.ask_calls import opening as ask_opening
from tests.support.ask_calls import question
from tests.support.cloud import TIMEOUT, Device, Running, generate, personal
from tests.support.waiting import wait_for

from perfit_cloud.engine.generation.continuous import GenerationEngine
from perfit_cloud.engine.generation.engine import GenerationRequest
from perfit_cloud.engine.generation.penalties import Penalties
from perfit_cloud.engine.generation.stream import TextStream
from perfit_cloud.engine.gradients.activation_cache import ActivationCache
from perfit_cloud.engine.gradients.scheduler import GradientScheduler
from perfit_cloud.engine.gradients.session import GradientRequest, UpdateEngine, UpdateSession
from perfit_cloud.engine.gradients.stateless import GradientEngine
from perfit_cloud.engine.interface import Gradient, ShiftUse
from perfit_cloud.model.artefacts import Artefact
from perfit_shared.shifts import ShiftTensors
from perfit_shared.types import Sampling
from perfit_shared.wire import personalization_pb2 as pb

PERSONAL = (
    Message,
    GenerationRequest,
    TextStream,
    Penalties,
    ShiftUse,
    ShiftTensors,
    Sampling,
    GradientRequest,
    UpdateSession,
    ActivationCache,
    Gradient,
)


def left() -> list[str]:
    """What there is of a call, as types; memory for keys and values that is overwritten does not count."""
    gc.collect()
    found = []
    for each in gc.get_objects():  # without what was there before, which is frozen
        if isinstance(each, torch.Tensor):
            if not isinstance(each, torch.nn.Parameter) and bool((each != 0).any()):
                found.append(f"tensor {tuple(each.shape)}")
        elif isinstance(each, PERSONAL):
            found.append(type(each).__name__)
    return found


@pytest.fixture
def arrays(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[Any]]:
    """The arrays of all shifts that are decoded: the collector does not know of arrays."""
    seen: list[weakref.ref[Any]] = []
    decode = ShiftTensors.from_bytes

    def watched(*args: Any) -> ShiftTensors:
        tensors = decode(*args)
        seen.extend(weakref.ref(array) for _, array in tensors.named())
        return tensors

    monkeypatch.setattr(ShiftTensors, "from_bytes", staticmethod(watched))
    return seen


@pytest.fixture
def frozen() -> Iterator[None]:
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def test_the_look_finds_what_is_there(artefact: Artefact, frozen: None) -> None:
    """Otherwise the tests below would pass whatever is kept."""
    kept = [torch.ones(3), pb.Question(), ShiftUse, mine(artefact, 1)]
    assert sorted(left()) == ["Question", "ShiftTensors", "tensor (3,)"]
    del kept
    assert left() == []


def refused(call: Callable[[], object]) -> None:
    with pytest.raises(grpc.RpcError):
        call()


def generated(device: Device, artefact: Artefact) -> None:
    asked = generate(shift=personal(artefact)[0], stop=["zebra"], frequency_penalty=0.5)
    assert list(device.stub.Generate(asked, timeout=TIMEOUT))


def generate_cancelled(device: Device, artefact: Artefact) -> None:
    asked = generate(shift=personal(artefact)[0], max_new_tokens=200, presence_penalty=0.5)
    call = device.stub.Generate(asked, timeout=TIMEOUT)
    next(call)
    call.cancel()


def generate_refused(device: Device, artefact: Artefact) -> None:
    refused(lambda: list(device.stub.Generate(generate(shift=personal(artefact)[0], top_p=7))))


def generate_late(device: Device, artefact: Artefact) -> None:
    refused(lambda: list(device.stub.Generate(generate(shift=personal(artefact)[0]), timeout=0.5)))


def scored(device: Device, artefact: Artefact) -> None:
    candidates = [pb.Candidate(prompt=pb.Prompt(text=text), answer=answer) for text, answer in EXAMPLES]
    request = pb.ScoreRequest(candidates=candidates, shift=personal(artefact)[0])
    assert device.stub.Score(request, timeout=TIMEOUT).scores


def gradient_of(device: Device, artefact: Artefact) -> None:
    pairs = [pb.Example(prompt=pb.Prompt(text=text), target=target) for text, target in EXAMPLES]
    request = pb.ComputeGradientRequest(examples=pairs, shift=personal(artefact)[0])
    assert device.stub.ComputeGradient(request, timeout=TIMEOUT).gradient


def gradient_failed(device: Device, artefact: Artefact) -> None:
    refused(lambda: gradient_of(device, artefact))


def asked(device: Device, artefact: Artefact) -> None:
    requests = [ask_opening(personal(artefact)[0]), question(1), question(2, "the dog ran")]
    assert list(device.stub.Ask(iter(requests), timeout=TIMEOUT))


def ask_client_gone(device: Device, artefact: Artefact) -> None:
    go = threading.Event()

    def requests() -> Iterator[pb.AskRequest]:
        yield ask_opening(personal(artefact)[0])
        yield question(1, max_new_tokens=200)
        go.wait(TIMEOUT)

    call = device.stub.Ask(requests(), timeout=TIMEOUT)
    next(call)
    device.channel.close()
    go.set()


def ask_refused(device: Device, artefact: Artefact) -> None:
    requests = [ask_opening(personal(artefact)[0]), ask_opening(personal(artefact)[0])]
    refused(lambda: list(device.stub.Ask(iter(requests), timeout=TIMEOUT)))


def steps_of(artefact: Artefact, *rows: list[int]) -> Iterator[pb.AdaptRequest]:
    yield adapt_opening(artefact)
    yield examples(EXAMPLES)
    for number, each in enumerate(rows):
        yield step(mine(artefact, number), each)


def adapted(device: Device, artefact: Artefact) -> None:
    assert len(list(device.stub.Adapt(steps_of(artefact, [0, 2], [1]), timeout=TIMEOUT))) == 2


def adapt_refused(device: Device, artefact: Artefact) -> None:
    refused(lambda: list(device.stub.Adapt(steps_of(artefact, [0], [99]), timeout=TIMEOUT)))


def adapt_failed(device: Device, artefact: Artefact) -> None:
    refused(lambda: list(device.stub.Adapt(steps_of(artefact, [0]), timeout=TIMEOUT)))


def adapt_client_gone(device: Device, artefact: Artefact) -> None:
    go = threading.Event()

    def requests() -> Iterator[pb.AdaptRequest]:
        yield from steps_of(artefact, [0])
        go.wait(TIMEOUT)

    call = device.stub.Adapt(requests(), timeout=TIMEOUT)
    next(call)
    device.channel.close()
    go.set()


def broken(*_: object, **__: object) -> Any:
    raise ZeroDivisionError


def slow(self: torch.nn.Embedding, ids: torch.Tensor) -> torch.Tensor:
    time.sleep(1)
    return torch.nn.functional.embedding(ids, self.weight)


CHANGED: dict[Any, tuple[type, str, Callable[..., Any]]] = {
    gradient_failed: (GradientEngine, "run_pass", broken),
    adapt_failed: (UpdateEngine, "run_pass", broken),
    generate_late: (torch.nn.Embedding, "forward", slow),
}


@pytest.mark.parametrize(
    "call",
    [
        generated,
        generate_cancelled,
        generate_refused,
        generate_late,
        scored,
        gradient_of,
        gradient_failed,
        asked,
        ask_client_gone,
        ask_refused,
        adapted,
        adapt_refused,
        adapt_failed,
        adapt_client_gone,
    ],
)
def test_nobody_keeps_anything_of_a_call(
    call: Callable[[Device, Artefact], None],
    run: Callable[..., Running],
    artefact: Artefact,
    generation: GenerationEngine,
    step_queue: GradientScheduler,
    arrays: list[weakref.ref[Any]],
    monkeypatch: pytest.MonkeyPatch,
    frozen: None,
) -> None:
    device = run().device()
    if call in CHANGED:
        monkeypatch.setattr(*CHANGED[call])
    gc.collect()
    gc.freeze()  # the server's own messages, too
    call(device, artefact)
    device.channel.close()
    wait_for(lambda: left() == [])
    assert arrays
    assert all(array() is None for array in arrays)


def test_nobody_keeps_anything_of_answers_that_failed(
    run: Callable[..., Running],
    artefact: Artefact,
    generation: GenerationEngine,
    monkeypatch: pytest.MonkeyPatch,
    frozen: None,
) -> None:
    device = run().device()
    monkeypatch.setattr(torch.nn.Embedding, "forward", broken)
    gc.collect()
    gc.freeze()
    refused(lambda: generated(device, artefact))
    device.channel.close()
    wait_for(lambda: left() == [])
