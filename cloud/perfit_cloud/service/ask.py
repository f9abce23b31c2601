"""Ask: several answers over one stream, the shift sent once."""

from __future__ import annotations

from collections.abc import Iterator

import grpc

from perfit_cloud.service.calls import Generation
from perfit_cloud.service.codec import PromptReader
from perfit_cloud.service.limits import Gate
from perfit_cloud.service.served import Served
from perfit_shared.wire import personalization_pb2 as pb

__all__ = ["Asking"]


class Asking:
    def __init__(
        self, served: Served, reader: PromptReader, *,
        generation: Generation, streams: Gate, stream_seconds: float,
    ) -> None:  # fmt: skip
        self._served = served

    def answers(
        self, requests: Iterator[pb.AskRequest], context: grpc.ServicerContext
    ) -> Iterator[pb.AskResponse]:
        raise NotImplementedError
