"""The messages of Adapt, and a stream that sends when a test says so."""

from __future__ import annotations

import queue
from collections.abc import Sequence
from typing import Any

from perfit_cloud.engine.gradients.session import UpdateEngine
from perfit_cloud.model.artefacts import Artefact
from perfit_shared.shifts import ShiftTensors
from perfit_shared.wire import personalization_pb2 as pb
from tests.support.cloud import TIMEOUT, Device
from tests.support.models import random_shift
from tests.support.waiting import wait_for

EXAMPLES = [
    ("the cat sat on the mat", " the dog"),
    ("the dog ran", " to the door"),
    ("a", " cat"),
    ("the mat and the door and the cat and the dog", " ran"),
    ("to the door", " the cat sat"),
]


def opening(artefact: Artefact, /, **change: str) -> pb.AdaptRequest:
    return pb.AdaptRequest(
        open=pb.AdaptOpen(**{"artefact": artefact.name, "version": artefact.version} | change)
    )


def examples(pairs: Sequence[tuple[str, str]]) -> pb.AdaptRequest:
    made = [pb.Example(prompt=pb.Prompt(text=text), target=target) for text, target in pairs]
    return pb.AdaptRequest(examples=pb.AdaptExamples(examples=made))


def step(tensors: ShiftTensors | bytes, rows: Sequence[int], *, loss_only: bool = False) -> pb.AdaptRequest:
    data = tensors if isinstance(tensors, bytes) else tensors.to_bytes()
    return pb.AdaptRequest(step=pb.AdaptStep(personal=data, rows=rows, loss_only=loss_only))


def mine(artefact: Artefact, seed: int) -> ShiftTensors:
    return random_shift(artefact.spec, artefact.spec.personal_rank, seed)


class Stream:
    """An open stream that sends when told to."""

    def __init__(self, device: Device, *messages: pb.AdaptRequest) -> None:
        self._requests: queue.SimpleQueue[pb.AdaptRequest | None] = queue.SimpleQueue()
        self.call: Any = device.stub.Adapt(iter(self._requests.get, None), timeout=TIMEOUT)
        self.send(*messages)

    def send(self, *messages: pb.AdaptRequest) -> None:
        for message in messages:
            self._requests.put(message)

    def ask(self, *messages: pb.AdaptRequest) -> pb.AdaptResponse:
        self.send(*messages)
        return next(self.call)

    def end(self) -> None:
        """Send no more."""
        self._requests.put(None)


def wait_until_freed(engine: UpdateEngine) -> None:
    """Fail unless nothing of any update is held, once the server has had a moment."""
    wait_for(lambda: engine.bytes_held() == (0, 0), what="nothing of an update is held")
