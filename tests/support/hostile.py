"""What hostile devices send, and an honest one beside them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import grpc
import numpy as np
import safetensors.numpy

from perfit_cloud.model.artefacts import Artefact
from perfit_cloud.service.limits import Limits
from perfit_shared.shifts import LayerShift, ShiftSpec
from perfit_shared.wire import personalization_pb2 as pb
from tests.support.adapt_calls import EXAMPLES, Stream, examples, mine, opening, step
from tests.support.cloud import TIMEOUT, Running, generate, personal
from tests.support.models import random_shift

PATH = "/perfit.v1.Personalization/"
PATIENCE = 30.0  # seconds that an honest call may take beside a hostile device, on a busy machine


class Honest:
    """A device that asks the same again and again, and knows what it should get."""

    def __init__(self, running: Running, artefact: Artefact) -> None:
        self.device = running.device()
        self._artefact = artefact
        self._shift, _ = personal(artefact, seed=3)
        self._stream = Stream(self.device, opening(artefact), examples(EXAMPLES))
        self._wanted = self._ask()

    def _ask(self) -> list[bytes]:
        stub = self.device.stub
        pairs = [pb.Example(prompt=pb.Prompt(text=text), target=target) for text, target in EXAMPLES]
        answer = list(stub.Generate(generate(shift=self._shift), timeout=PATIENCE))
        request = pb.ComputeGradientRequest(examples=pairs, shift=self._shift)
        return [
            "".join(message.text for message in answer).encode(),
            stub.ComputeGradient(request, timeout=PATIENCE).SerializeToString(),
            self._stream.ask(step(mine(self._artefact, 4), [0, 2, 3])).SerializeToString(),
        ]

    def check(self) -> None:
        """The same bits as before, soon enough."""
        begun = time.monotonic()
        assert self._ask() == self._wanted
        assert time.monotonic() - begun < PATIENCE

    def end(self) -> None:
        self._stream.end()
        self._stream.call.cancel()


LIMITS = Limits(
    adapt_examples=64,
    adapt_tokens=4096,
    questions=4,
    prompt_tokens=40,
    new_tokens=20,
    context=50,
    examples=3,
    call_tokens=100,
    message_bytes=1 << 20,
)


def hostile_tensors(spec: ShiftSpec) -> dict[str, bytes]:
    good = dict(random_shift(spec, spec.personal_rank, 1).named())
    layer = spec.layers[0]
    rotation, source, bias = (f"layers.{layer}.{part}" for part in LayerShift._fields)
    changes: dict[str, dict[str, Any]] = {
        "nan": {source: good[source] * np.nan},
        "infinite": {bias: good[bias] * np.inf},
        "huge": {source: good[source] * 1e6},
        "not orthonormal": {rotation: good[rotation] * 1.1},
        "shape": {source: good[source][:-1]},
        "transposed": {source: np.ascontiguousarray(good[source].T)},
        "name": {"layers.1.weight": good[source]},
        "another layer": {f"layers.0.{part}": good[f"layers.{layer}.{part}"] for part in LayerShift._fields},
        "float64": {source: good[source].astype(np.float64)},
        "integers": {name: array.astype(np.int32) for name, array in good.items()},
    }
    payloads = {kind: safetensors.numpy.save({**good, **change}) for kind, change in changes.items()}
    payloads["missing"] = safetensors.numpy.save({n: a for n, a in good.items() if n != bias})
    return payloads


@contextmanager
def again_and_again(act: Callable[[], object], threads: int = 2) -> Iterator[list[int]]:
    """`act` in several threads until the block is left; how often, in the end."""
    over, times = threading.Event(), [0]

    def run() -> None:
        while not over.is_set():
            act()
            times[0] += 1

    workers = [threading.Thread(target=run, daemon=True) for _ in range(threads)]
    for worker in workers:
        worker.start()
    try:
        yield times
    finally:
        over.set()
        for worker in workers:
            worker.join(TIMEOUT)


def refused(call: Callable[[], object]) -> str:
    """Status of a call that may fail."""
    try:
        call()
    except grpc.RpcError as error:
        return str(error.code().name)  # type: ignore[attr-defined]
    return "OK"
