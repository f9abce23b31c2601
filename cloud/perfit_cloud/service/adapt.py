"""Adapt: one update over one stream, its examples sent once."""

from __future__ import annotations

from collections.abc import Iterator

import grpc

from perfit_cloud.engine.steps import StepQueue
from perfit_cloud.service.codec import PromptReader
from perfit_cloud.service.limits import Gate
from perfit_cloud.service.served import Served
from perfit_shared.wire import personalization_pb2 as pb

__all__ = ["Adapting"]


class Adapting:
    def __init__(
        self, served: Served, reader: PromptReader, *,
        queue: StepQueue, streams: Gate, stream_seconds: float,
    ) -> None:  # fmt: skip
        self._served = served

    def steps(
        self, requests: Iterator[pb.AdaptRequest], context: grpc.ServicerContext
    ) -> Iterator[pb.AdaptResponse]:
        raise NotImplementedError
