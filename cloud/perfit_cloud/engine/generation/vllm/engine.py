"""Answers by vLLM: our queue, promises and streams around its engine core."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from perfit_cloud.engine.device_lock import DeviceLock
from perfit_cloud.engine.generation.engine import GenerationRequest, OwnEngine
from perfit_cloud.engine.generation.vllm.core import EngineCore, copy_bytes
from perfit_cloud.engine.generation.vllm.side_channel import Layout, SideChannel
from perfit_cloud.engine.interface import EngineHealth, GenerationSettings
from perfit_cloud.model.artefacts import Artefact
from perfit_cloud.model.base import BaseModel

__all__ = ["VllmEngine"]

_log = logging.getLogger(__name__)


class VllmEngine(OwnEngine):
    """vLLM's engine core in this process.

    Requests wait here, so that owners share the cache, and go to vLLM when all of their tokens have room
    there. So it never has to preempt one; if it did, the prompt would be read and shifted once more.
    """

    continuous = True
    packs = False

    @staticmethod
    def weight_bytes(base: BaseModel, tensor_parallel: int) -> int:
        """A copy in vLLM's own layout, on a CPU; several workers have theirs in processes of their own."""
        return copy_bytes(base) if tensor_parallel == 1 else 0

    def __init__(
        self,
        base: BaseModel,
        artefacts: Mapping[str, Artefact],
        settings: GenerationSettings,
        device_lock: DeviceLock | None = None,
    ) -> None:
        """Loads vLLM's copy of the weights. Raises ConfigError without vLLM, InvalidData if it cannot."""
        super().__init__(base, artefacts, settings, device_lock)
        self._number = {id(self._collective[name]): at for at, name in enumerate(artefacts)}
        layout = Layout.of([*artefacts.values()], settings.max_requests)
        collective = [self._collective[name] for name in artefacts]
        self._channel, name = SideChannel.create(layout, collective)
        try:
            told = {"layout": layout.to_json(), "name": str(name)}
            self._core = EngineCore(base, settings, told, self._worker_ended)
        finally:
            name.unlink()  # every worker has it mapped by now
        self._free = [*range(settings.max_requests)]  # slots
        self._running: dict[GenerationRequest, tuple[str, int]] = {}  # by request: its name in vLLM, its slot
        self._names: dict[str, GenerationRequest] = {}
        self._count = 0

    @property
    def cache_tokens_held(self) -> int:
        return sum(request.most_tokens for request in [*self._running])

    def health(self) -> EngineHealth:
        health = super().health()
        return health._replace(is_alive=health.is_alive and self._core.is_alive)

    def stop(self) -> None:
        super().stop()
        if self._core is not None:
            self._core.close()

    def _has_work(self) -> bool:
        return bool(self._waiting or self._running or self._core.is_busy)

    def _round(self) -> None:
        self._admit()
        if not self._core.is_busy:
            return
        for output in self._core.step():
            request = self._names.get(output.request)
            if request is None:
                continue
            for token, likelihood in zip(output.tokens, output.likelihoods, strict=True):
                if self._produced(request, token, likelihood):
                    break

    def _worker_ended(self) -> None:
        """Nothing can be computed any more. Called in a thread of vLLM's, which has stopped the others."""
        _log.error("a worker process of vLLM ended by itself; nothing is answered until the server restarts")
        with self._changed:
            self._is_stopped = True
            self._changed.notify()

    def _end(self, request: GenerationRequest) -> None:
        self._release(request)
        super()._end(request)

    def _drop(self) -> None:
        for request in [*self._running]:
            self._release(request)
        if not self._is_stopped:
            while self._core.is_busy:  # so that workers forget them
                self._core.step()

    def _release(self, request: GenerationRequest) -> None:
        name, slot = self._running.pop(request)
        del self._names[name]
        self._core.abort([name])
        self._channel.clear(slot)
        self._free.append(slot)

    def _admit(self) -> None:
        """Let go of those who left, and hand over those who wait while there is room."""
        for left in [r for r in self._running if r.has_left]:
            self._release(left)
        while self._free and not (self.settings.alone and self._running):
            request = self._next_waiting(self._running)
            if request is None:
                return
            if self.cache_tokens_held + request.most_tokens > self.settings.cache_tokens:
                return
            self._hand_over(request)
            with self._changed:
                if request in self._waiting:
                    self._waiting.remove(request)
            if request.has_left:
                self._release(request)

    def _hand_over(self, request: GenerationRequest) -> None:
        self._count += 1
        name, slot, shift = str(self._count), self._free.pop(), request.shift
        self._running[request] = (name, slot)
        self._names[name] = request
        told: list[int] = []
        if shift.positions:
            if shift.personal is not None:
                self._channel.fill(slot, shift.personal)
            of_artefact = self._number[id(shift.collective)]
            told = [of_artefact, -1 if shift.personal is None else slot, *shift.positions]
        self._core.add(name, request.prompt, request.sampling, sorted(self._end_ids), told)
