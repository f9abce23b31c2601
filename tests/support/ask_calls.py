"""The messages of Ask, and a stream that sends when a test says so."""

from __future__ import annotations

import queue
import threading
from collections.abc import Sequence
from typing import Any

from perfit_shared.wire import personalization_pb2 as pb
from tests.support.cloud import BASE, TIMEOUT, Device


def question(number: int, text: str = "the cat sat", **sampling: Any) -> pb.AskRequest:
    sampling = {"max_new_tokens": 12, **sampling}
    return pb.AskRequest(
        question=pb.Question(number=number, prompt=pb.Prompt(text=text), sampling=pb.Sampling(**sampling))
    )


def opening(shift: pb.Shift = BASE) -> pb.AskRequest:
    return pb.AskRequest(shift=shift)


class Stream:
    """An Ask call whose questions are sent when the test says so."""

    def __init__(self, device: Device, *first: pb.AskRequest, timeout: float = TIMEOUT) -> None:
        self._outbox: queue.SimpleQueue[pb.AskRequest | None] = queue.SimpleQueue()
        self.send(*first)
        self.call = device.stub.Ask(iter(self._outbox.get, None), timeout=timeout)

    def send(self, *requests: pb.AskRequest) -> None:
        for request in requests:
            self._outbox.put(request)

    def end(self) -> None:
        self._outbox.put(None)

    def next(self) -> pb.AskResponse:
        response: pb.AskResponse = next(self.call)
        return response


def ask(device: Device, *requests: pb.AskRequest) -> list[pb.AskResponse]:
    """All responses to a stream of these."""
    return list(device.stub.Ask(iter(requests), timeout=TIMEOUT))


def texts_of(responses: Sequence[pb.AskResponse]) -> dict[int, str]:
    texts: dict[int, str] = {}
    for response in responses:
        texts[response.number] = texts.get(response.number, "") + response.part.text
    return texts


def failures_of(responses: Sequence[pb.AskResponse]) -> dict[int, pb.Failure]:
    return {r.number: r.failure for r in responses if r.WhichOneof("body") == "failure"}


def ask_threads() -> int:
    return sum(thread.name.startswith("perfit-ask") for thread in threading.enumerate())
