"""What all engines share: requests, admission, a thread, streams."""

from __future__ import annotations

import logging
import threading
import time
import weakref
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

import torch

from perfit_cloud.engine.device_lock import DeviceLock
from perfit_cloud.engine.errors import error_location
from perfit_cloud.engine.fairness import FairShare
from perfit_cloud.engine.generation.sampling import Likelihood, Sampler
from perfit_cloud.engine.generation.stream import TextStream, WholeText, finish_of
from perfit_cloud.engine.interface import EngineHealth, GenerationSettings, ShiftUse, most_tokens
from perfit_cloud.model.artefacts import Artefact
from perfit_cloud.model.base import BaseModel
from perfit_cloud.model.interventions import Intervention, Shift, install, to_torch
from perfit_cloud.model.packed import pack_linear_layers
from perfit_shared.errors import Busy, InvalidPrompt, InvalidTensors, NotFound, Unavailable
from perfit_shared.positions import Positions
from perfit_shared.types import Mode, Sampling

__all__ = ["GenerationRequest", "OwnEngine", "intervention"]

_log = logging.getLogger(__name__)
_BUSY_MS = 1000  # before a refused request may retry
_Sink = TypeVar("_Sink", TextStream, WholeText)


def intervention(
    use: ShiftUse, prompt_tokens: int, collective: Callable[[Artefact], Shift], device: torch.device
) -> Intervention:
    """What `use` does to a prompt of this length. `collective` gives an artefact's φ₁."""
    if use.mode is Mode.BASE or use.artefact is None:
        return Intervention()
    return Intervention(
        tuple(Positions.parse(use.artefact.spec.positions).indices(prompt_tokens)),
        collective(use.artefact),
        None if use.personal is None else to_torch(use.personal, device),
    )


@dataclass(eq=False)
class GenerationRequest:
    """One answer in flight: what was asked for, and how far it is. Dropped when it ends."""

    prompt: list[int]
    shift: Intervention
    sampling: Sampling
    sampler: Sampler | None  # None: the arg-max
    stream: TextStream | WholeText
    owner: str = ""
    produced: int = 0  # tokens
    has_left: bool = False  # nobody reads its answer any more

    @property
    def most_tokens(self) -> int:
        """What it takes of the cache at most."""
        return len(self.prompt) + self.sampling.max_new_tokens


class OwnEngine(ABC):
    """An `Engine` whose passes run in a thread of this process.

    A subclass says in `_round` what that thread does with `_waiting` while there is work.
    """

    continuous: bool
    packs = True

    @staticmethod
    def weight_bytes(_base: BaseModel, _tensor_parallel: int) -> int:
        """None, unless they are packed."""
        return 0

    def __init__(
        self,
        base: BaseModel,
        artefacts: Mapping[str, Artefact],
        settings: GenerationSettings,
        device_lock: DeviceLock | None = None,
    ) -> None:
        """All engines on the base's device share `device_lock`."""
        self.settings = settings
        self._base, self._device_lock = base, device_lock or DeviceLock()
        self._end_ids = frozenset(base.end_ids)
        self._vocabulary = int(base.model.get_input_embeddings().num_embeddings)
        self._collective = {name: to_torch(a.collective, base.device) for name, a in artefacts.items()}
        self._changed = threading.Condition()
        # Both are changed under the condition alone.
        self._requests: set[GenerationRequest] = set()  # all in flight
        self._waiting: deque[GenerationRequest] = deque()  # those that no pass has seen
        self._share = FairShare()  # of what the subclass divides among owners
        self._thread: threading.Thread | None = None
        self._is_stopped = False
        self._moved = time.monotonic()  # when it last began a round or made a token

    # -- for callers ---------------------------------------------------------------------------

    def start(self) -> None:
        """Start the engine's thread; `submit` does it too when needed."""
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
    def cache_tokens_held(self) -> int:
        """Tokens reserved in a cache of our own. The model library's caches are not counted."""
        return 0

    def health(self) -> EngineHealth:
        """Does not take the condition, which a stuck thread may hold."""
        held, waiting, thread = len(self._requests), len(self._waiting), self._thread
        is_alive = not self._is_stopped and not (held and thread is not None and not thread.is_alive())
        return EngineHealth(
            held - waiting, waiting, time.monotonic() - self._moved if held else 0.0, is_alive
        )

    def submit(self, prompt: list[int], shift: ShiftUse, sampling: Sampling, owner: str = "") -> TextStream:
        """Queue one answer; see `Engine`."""
        self._check(prompt, shift, sampling)
        request, stream = self._request(prompt, shift, sampling, owner, TextStream)
        with self._changed:
            if len(self._requests) >= self.settings.max_requests:
                raise Busy("the cloud is answering as many as it can; try again", retry_ms=_BUSY_MS)
            self._ensure_thread()
            if not self._requests:
                self._moved = time.monotonic()
            self._requests.add(request)
            self._waiting.append(request)
            self._changed.notify()
        return stream

    def answer_all(
        self,
        prompts: Sequence[list[int]],
        uses: Sequence[ShiftUse],
        samplings: Sequence[Sampling],
        done: Callable[[int], None],
    ) -> list[str]:
        """All these answers, made in this thread, of an engine that has no other requests.

        Who shares a pass is a function of the arguments alone, so the answers are too. `done` gets the
        number of answers that ended. Raises as `submit` does, before the first pass.
        """
        for asked in zip(prompts, uses, samplings, strict=True):
            self._check(*asked)
        pending = zip(prompts, uses, samplings, strict=True)
        texts: list[WholeText] = []
        ended = 0
        try:
            while ended < len(prompts):
                for asked in islice(pending, self.settings.max_requests - len(self._requests)):
                    request, text = self._request(*asked, "", WholeText)
                    texts.append(text)
                    self._requests.add(request)
                    self._waiting.append(request)
                self._round()
                over = len(texts) - len(self._requests)
                if over > ended:
                    done(over - ended)
                    ended = over
        finally:
            self._requests.clear()
            self._waiting.clear()
            self._drop()
            self._rest()
        return [text.text for text in texts]

    # -- for subclasses ------------------------------------------------------------------------

    @abstractmethod
    def _has_work(self) -> bool:
        """Whether there is something for `_round` to do. Called under the condition."""

    @abstractmethod
    def _round(self) -> None:
        """Do some of it, while the thread holds the device.

        An error ends the answers that left `_waiting`, and the thread goes on.
        """

    @abstractmethod
    def _drop(self) -> None:
        """Forget everything held for requests, after an error or at the end."""

    def _rest(self) -> None:
        """Nobody wants anything: forget who had what."""
        self._share.wanted_by(())

    def _end(self, request: GenerationRequest) -> None:
        """The last token is there. Frees the request first, so that whoever reads the token finds room."""
        with self._changed:
            self._requests.discard(request)

    def _produced(self, request: GenerationRequest, token: int, likelihood: Likelihood | None) -> bool:
        """Hand over a token; whether it was the last."""
        self._moved = time.monotonic()
        request.produced += 1
        is_last = finish_of(token, request.produced, request.sampling, self._end_ids) is not None
        if is_last:
            self._end(request)
        request.stream.put(token, likelihood)
        return is_last

    def _hooked(self, base: BaseModel, artefacts: Mapping[str, Artefact]) -> Any:
        """A tree of the model's modules whose blocks carry a hook where an artefact names them."""
        model = base.share_weights()
        if self.settings.pack_weights:
            pack_linear_layers(model)
        install(model, {layer for a in artefacts.values() for layer in a.spec.layers})
        return model

    def _next_waiting(self, running: Iterable[GenerationRequest]) -> GenerationRequest | None:
        """Of those who wait, the first of the owner whose `running` requests take least of the cache."""
        with self._changed:
            if not self._waiting:
                return None
            held = Counter[str]()
            for request in running:
                held[request.owner] += request.most_tokens
            return min(self._waiting, key=lambda waiting: held[waiting.owner])

    # -- helpers -------------------------------------------------------------------------------

    def _check(self, prompt: Sequence[int], shift: ShiftUse, sampling: Sampling) -> None:
        """Refuse what could fail in a pass, where it would end everybody's answers."""
        room = most_tokens(self._base.context, self.settings.cache_tokens)
        if not prompt or len(prompt) + sampling.max_new_tokens > room:
            raise InvalidPrompt(
                f"the prompt has {len(prompt)} tokens; with {sampling.max_new_tokens} for the answer "
                f"that is over the {room} that fit"
            )
        if not 0 <= min(prompt) <= max(prompt) < self._vocabulary:
            raise InvalidPrompt("the prompt has a token that the model does not know; tell the operator")
        if shift.mode is Mode.BASE:
            return
        if shift.artefact is None or shift.artefact.name not in self._collective:
            raise NotFound("this engine does not have the artefact; tell the operator")
        if shift.mode is Mode.PERSONAL:
            if shift.personal is None:
                raise InvalidTensors("personal mode needs the tensors of a personal shift")
            shift.personal.check_layout(shift.artefact.spec, shift.artefact.spec.personal_rank)

    def _request(
        self,
        prompt: list[int],
        shift: ShiftUse,
        sampling: Sampling,
        owner: str,
        sink: Callable[[BaseModel, int, Sampling, Callable[[], None]], _Sink],
    ) -> tuple[GenerationRequest, _Sink]:
        """A request, and what takes its tokens."""
        known: Callable[[], GenerationRequest | None]

        def leave() -> None:
            request = known()
            if request is not None:
                self._leave(request)

        stream = sink(self._base, len(prompt), sampling, leave)
        request = GenerationRequest(
            prompt=prompt,
            shift=intervention(shift, len(prompt), lambda of: self._collective[of.name], self._base.device),
            sampling=sampling,
            sampler=Sampler.of(sampling),
            stream=stream,
            owner=owner,
        )
        # Weak, or request and stream would form a cycle, and what a request holds would outlive the
        # engine's last use of it until the next garbage collection.
        known = weakref.ref(request)
        return request, stream

    def _leave(self, request: GenerationRequest) -> None:
        with self._changed:
            request.has_left = True
            if request in self._requests:
                self._requests.discard(request)
                if request in self._waiting:
                    self._waiting.remove(request)
                self._changed.notify()  # a waiting request may have its room

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
                    self._fail(spares_waiting=True)
        finally:
            self._fail()

    def _rounds(self) -> None:
        """Run rounds while there is work. Between two, others get the device if they had less of it."""
        while not self._is_stopped and self._has_work():
            self._moved = time.monotonic()
            self._round()
            self._device_lock.yield_to_waiting()
        self._rest()

    def _fail(self, *, spares_waiting: bool = False) -> None:
        """End all answers in flight, or only those that a pass has seen.

        If no pass has seen any, the error came before one began. It would come again for those who wait, so
        they are not spared.
        """
        with self._changed:
            spared = set(self._waiting) if spares_waiting else set()
            requests = self._requests - spared or self._requests
            self._requests = self._requests - requests
            self._waiting = deque(request for request in self._waiting if request in self._requests)
        self._rest()
        try:
            self._drop()
        except Exception as error:
            _log.error("what answers left cannot be dropped: %s", error_location(error))
            with self._changed:  # a device that cannot drop its caches cannot answer either
                self._is_stopped = True
        for request in requests:
            request.stream.fail()
