"""What every way of generating has in common: requests, places, a thread of its own, answers."""

from __future__ import annotations

import logging
import threading
import time
import weakref
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

from perfit_cloud.engine.device_lock import DeviceLock
from perfit_cloud.engine.errors import error_location
from perfit_cloud.engine.fairness import FairShare
from perfit_cloud.engine.generation.sampling import Sampler
from perfit_cloud.engine.generation.stream import CompletionStream
from perfit_cloud.engine.interface import EngineHealth, Mode, Sampling, ShiftUse
from perfit_cloud.model.artefacts import Artefact
from perfit_cloud.model.base import BaseModel
from perfit_cloud.model.interventions import Shift, ShiftGroup, install, row_index, stack, to_torch
from perfit_shared.errors import Busy, InvalidPrompt, Unavailable
from perfit_shared.positions import Positions

__all__ = ["Engine", "GenerationRequest", "GenerationSettings"]

_log = logging.getLogger(__name__)
_BUSY_MS = 1000  # what a refused request is told to wait


@dataclass(frozen=True)
class GenerationSettings:
    cache_tokens: int = 32_768  # tokens whose keys and values are held at once
    batch_tokens: int = 512  # most tokens of one forward pass; longer prompts go in pieces
    max_requests: int = 64  # answers in flight; more are refused with Busy
    alone: bool = False  # a pass for each request: who else is there changes no bit of an answer


@dataclass(eq=False)
class GenerationRequest:
    """One answer in flight: what was asked for, and how far it is. Dropped when it ends."""

    prompt: list[int]
    positions: tuple[int, ...]  # intervened prompt positions, ascending
    artefact: str  # "" in BASE mode
    personal: Shift | None
    sampling: Sampling
    sampler: Sampler | None  # None: greedy
    answer: CompletionStream
    owner: str = ""  # whose it is
    produced: int = 0  # tokens
    has_left: bool = False  # nobody reads its answer any more


class Engine(ABC):
    """Answers for many devices over one base model and any number of artefacts. Thread-safe.

    A subclass says in `_round` what its thread does with `_waiting` while there is work.
    """

    continuous: bool  # whether a request joins the batch at once, or when the one before is over

    def __init__(
        self,
        base: BaseModel,
        artefacts: Mapping[str, Artefact],
        settings: GenerationSettings,
        device_lock: DeviceLock | None = None,
    ) -> None:
        """`turns`: of all engines on the base's device."""
        self.settings = settings
        self.end_ids = frozenset(base.end_ids)
        self._base, self._device_lock = base, device_lock or DeviceLock()
        self._model = base.share_weights()
        # Only blocks that an artefact names carry a hook.
        install(self._model, {layer for a in artefacts.values() for layer in a.spec.layers})
        self._vocabulary = int(base.model.get_input_embeddings().num_embeddings)
        self._positions = {name: Positions.parse(a.spec.positions) for name, a in artefacts.items()}
        self._collective = {name: to_torch(a.collective, base.device) for name, a in artefacts.items()}
        self._changed = threading.Condition()
        # Under the condition: all that hold a place, and those of them that no pass has seen.
        self._requests: set[GenerationRequest] = set()
        self._waiting: deque[GenerationRequest] = deque()
        self._share = FairShare()  # of what the subclass shares out by owner
        self._thread: threading.Thread | None = None
        self._is_stopped = False
        self._moved = time.monotonic()  # when it last began a round or made a token

    # -- for callers ---------------------------------------------------------------------------

    def start(self) -> None:
        """Start the batch's thread; `submit` does it too when needed."""
        with self._changed:
            self._ensure_thread()

    def stop(self) -> None:
        """End the thread for good; answers in flight and all later ones raise Unavailable."""
        with self._changed:
            self._is_stopped = True
            thread = self._thread
            self._changed.notify()
        if thread is not None:
            thread.join()

    @property
    def in_flight(self) -> int:
        """Answers that hold a place."""
        return len(self._requests)

    @property
    def cache_tokens_held(self) -> int:
        """Tokens whose keys and values have a place, as far as that is not the model library's business."""
        return 0

    def health(self) -> EngineHealth:
        """Without the condition: whoever is stuck may hold it."""
        held, waiting, thread = len(self._requests), len(self._waiting), self._thread
        is_alive = not self._is_stopped and not (held and thread is not None and not thread.is_alive())
        return EngineHealth(
            held - waiting, waiting, time.monotonic() - self._moved if held else 0.0, is_alive
        )

    def submit(
        self, prompt: list[int], shift: ShiftUse, sampling: Sampling, owner: str = ""
    ) -> CompletionStream:
        """Queue one answer. All of one `owner` share what there is of passes and of the cache with others.

        Raises Busy when all places are taken, InvalidPrompt when prompt and answer cannot fit the
        model's context or the cache, Unavailable when the engine was stopped.
        """
        room = min(self._base.context, self.settings.cache_tokens // 2)
        if not prompt or len(prompt) + sampling.max_new_tokens > room:
            raise InvalidPrompt(
                f"the prompt has {len(prompt)} tokens; with {sampling.max_new_tokens} for the answer "
                f"that is over the {room} that fit"
            )
        if max(prompt) >= self._vocabulary:
            raise InvalidPrompt("the prompt has a token that the model does not know; tell the operator")
        request = self._request(prompt, shift, sampling, owner)
        with self._changed:
            if len(self._requests) >= self.settings.max_requests:
                raise Busy("the cloud is answering as many as it can; try again", retry_ms=_BUSY_MS)
            self._ensure_thread()
            if not self._requests:
                self._moved = time.monotonic()
            self._requests.add(request)
            self._waiting.append(request)
            self._changed.notify()
        return request.answer

    # -- for subclasses ------------------------------------------------------------------------

    @abstractmethod
    def _has_work(self) -> bool:
        """Whether there is something for `_round` to do. Called under the condition."""

    @abstractmethod
    def _round(self) -> None:
        """Do some of it, while the thread holds the device.

        An error ends the answers in flight, and the thread goes on.
        """

    @abstractmethod
    def _drop(self) -> None:
        """Forget everything held for requests, after an error or at the end."""

    def _rest(self) -> None:
        """Nobody wants anything: forget who had what."""
        self._share.wanted_by(())

    def _end(self, request: GenerationRequest) -> None:
        """Its last token is there; its place is given up before that goes out."""
        with self._changed:
            self._requests.discard(request)

    def _produced(self, request: GenerationRequest, token: int) -> bool:
        """Hand over a token; whether it was the last."""
        self._moved = time.monotonic()
        request.produced += 1
        is_last = token in self.end_ids or request.produced >= request.sampling.max_new_tokens
        if is_last:
            self._end(request)
        request.answer.put(token)
        return is_last

    def _groups(self, rows: Mapping[GenerationRequest, list[int]]) -> list[ShiftGroup]:
        """Who intervenes on which rows of a flattened batch: one group an artefact and mode."""
        owners: dict[tuple[str, bool], list[tuple[GenerationRequest, list[int]]]] = {}
        for request, of_request in rows.items():
            if of_request and request.artefact:
                key = (request.artefact, request.personal is not None)
                owners.setdefault(key, []).append((request, of_request))
        groups = []
        for (artefact, is_personal), members in owners.items():
            index, valid = row_index([of_request for _, of_request in members], self._base.device)
            shifts = [request.personal for request, _ in members if request.personal is not None]
            personal = stack(shifts) if is_personal else None
            groups.append(ShiftGroup(index, valid, self._collective[artefact], personal))
        return groups

    # -- helpers -------------------------------------------------------------------------------

    def _request(
        self, prompt: list[int], shift: ShiftUse, sampling: Sampling, owner: str
    ) -> GenerationRequest:
        name = "" if shift.mode is Mode.BASE or shift.artefact is None else shift.artefact.name

        def leave() -> None:
            request = known()
            if request is not None:
                self._leave(request)

        request = GenerationRequest(
            prompt=prompt,
            positions=tuple(self._positions[name].indices(len(prompt))) if name else (),
            artefact=name,
            personal=to_torch(shift.personal, self._base.device) if name and shift.personal else None,
            sampling=sampling,
            sampler=Sampler(sampling) if sampling.temperature > 0 else None,
            answer=CompletionStream(self._base, len(prompt), sampling, end_ids=self.end_ids, leave=leave),
            owner=owner,
        )
        # Weak: what a request holds goes with the engine's last use of it, not at some later collection.
        known = weakref.ref(request)
        return request

    def _leave(self, request: GenerationRequest) -> None:
        with self._changed:
            request.has_left = True
            if request in self._requests:
                self._requests.discard(request)
                if request in self._waiting:
                    self._waiting.remove(request)
                self._changed.notify()  # its place can be given to someone who waits

    def _ensure_thread(self) -> None:
        """Called under the condition. Raises Unavailable."""
        if self._is_stopped:
            raise Unavailable("the cloud is stopping; try again later")
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._run, name="perfit-generation", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._is_stopped or self._has_work())
                    if self._is_stopped:
                        return
                try:
                    with self._device_lock.hold():
                        self._rounds()
                except Exception as error:
                    _log.error("a pass failed: %s", error_location(error))
                    self._fail()
        finally:
            self._fail()

    def _rounds(self) -> None:
        """While there is work; others get the device between two rounds, if they had less of it."""
        while not self._is_stopped and self._has_work():
            self._moved = time.monotonic()
            self._round()
            self._device_lock.yield_to_waiting()
        self._rest()

    def _fail(self) -> None:
        """End all answers in flight."""
        with self._changed:
            requests, self._requests = self._requests, set()
            self._waiting.clear()
        self._rest()
        try:
            self._drop()
        except Exception as error:
            _log.error("what answers left cannot be dropped: %s", error_location(error))
            with self._changed:  # a device that cannot even forget will not answer either
                self._is_stopped = True
        for request in requests:
            request.answer.fail()
