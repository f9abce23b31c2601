"""Answers for many devices from one continuous batch, each with its own shift.

transformers' continuous batching schedules and caches; before every forward pass this module opens
a book that says which rows of the packed batch belong to whose prompt positions. Decoded tokens are
never intervened on, so a step without prefill opens an empty book.
"""

from __future__ import annotations

import itertools
import queue
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessorList,
)
from transformers.generation.continuous_batching.continuous_api import (
    ContinuousBatchingManager,
    OutputRouter,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from perfit_cloud.engine.sampling import Sampler
from perfit_cloud.engine.types import Finish, Mode, Piece, Sampling, ShiftUse
from perfit_cloud.model.artefacts import Artefact
from perfit_cloud.model.base import BaseModel
from perfit_cloud.model.shifts import Group, Shift, install, open_book, row_index, stack, to_torch
from perfit_shared.errors import Busy, InvalidPrompt, Unavailable
from perfit_shared.positions import Positions

__all__ = ["Answer", "GenerationEngine", "GenerationSettings"]

_PAGE = 32  # tokens of one page of the key-value cache
_LIVENESS_SECONDS = 5.0  # how often a reader without news asks whether the batch still runs
_BUSY_MS = 1000  # what a refused request is told to wait


@dataclass(frozen=True)
class GenerationSettings:
    cache_tokens: int = 32_768  # tokens whose keys and values are held at once
    batch_tokens: int = 2_048  # most tokens of one forward pass; longer prompts are chunked
    max_requests: int = 64  # answers in flight; more are refused with Busy


@dataclass(frozen=True)
class _Request:
    """What the engine knows of one answer in flight; dropped when it ends."""

    prompt_tokens: int
    positions: tuple[int, ...]  # intervened prompt positions, ascending
    artefact: str  # "" in BASE mode
    personal: Shift | None
    sampler: Sampler | None  # None: greedy
    outputs: queue.SimpleQueue[Any]


class Answer(Iterator[Piece]):
    """Pieces of one answer, blocking for the next. `cancel` ends it from any thread."""

    def __init__(
        self,
        engine: GenerationEngine,
        request_id: str,
        request: _Request,
        sampling: Sampling,
        *,
        manager: object,
    ) -> None:
        self._engine, self._id, self._request, self._sampling = engine, request_id, request, sampling
        self._manager = manager
        self._ids: list[int] = []
        self._sent = ""
        self._over = False

    def __next__(self) -> Piece:
        """Raises Unavailable when the engine stopped or died under it; ends when it was cancelled."""
        while not self._over:
            try:
                output = self._request.outputs.get(timeout=_LIVENESS_SECONDS)
            except queue.Empty:
                if self._engine.runs(self._manager):
                    continue
                output = None
            if self._over:
                break
            if output is None or output.error is not None:
                self.cancel()
                raise Unavailable("the cloud could not finish this answer; ask again")
            piece = self._advance(list(output.generated_tokens), done=output.is_finished())
            if piece is not None:
                return piece
        self.cancel()
        raise StopIteration

    def cancel(self) -> None:
        """Free the place in the batch. Harmless when the answer is over."""
        self._over = True
        self._engine.forget(self._id)
        self._request.outputs.put(None)  # wakes a reader in another thread

    def _advance(self, ids: list[int], *, done: bool) -> Piece | None:
        """The next piece, given all tokens so far; None when there is nothing to send yet."""
        self._ids = ids
        ended = bool(ids) and ids[-1] in self._engine.end_ids
        text = self._engine.decode(ids[:-1] if ended else ids)
        cut, stopped = _stop(text, self._sampling.stop)
        last = done or stopped
        if not last:  # hold back what may still turn into another character or into a stop text
            cut = len(text[:cut].rstrip("\ufffd"))
            cut -= _overlap(text[:cut], self._sampling.stop)
        new = text[len(self._sent) : cut]
        if not last and not new:
            return None
        self._sent += new
        if not last:
            return Piece(new)
        self._over = True
        self._engine.forget(self._id, running=not done)
        finish = Finish.END if ended or stopped else Finish.LENGTH
        return Piece(new, finish, self._request.prompt_tokens, len(ids))


def _stop(text: str, stops: tuple[str, ...]) -> tuple[int, bool]:
    """(length of text before the first stop, whether there is one)."""
    found = [at for stop in stops if (at := text.find(stop)) >= 0]
    return (min(found), True) if found else (len(text), False)


def _overlap(text: str, stops: tuple[str, ...]) -> int:
    """Length of the longest end of text that begins a stop."""
    return max(
        (n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])),
        default=0,
    )


class GenerationEngine:
    """Continuous batching over one base model and any number of artefacts. Thread-safe."""

    def __init__(
        self, base: BaseModel, artefacts: Mapping[str, Artefact], settings: GenerationSettings
    ) -> None:
        self.settings = settings
        self.end_ids = frozenset(base.end_ids)
        self.decode = base.decode
        self._base = base
        self._positions = {name: Positions.parse(a.spec.positions) for name, a in artefacts.items()}
        self._collective = {name: to_torch(a.collective, base.device) for name, a in artefacts.items()}
        self._model = base.twin()
        # Only blocks that an artefact names carry a hook.
        install(self._model, {layer for a in artefacts.values() for layer in a.spec.layers})
        self._requests: dict[str, _Request] = {}
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._manager: _Manager | None = None
        self._stopped = False

    def start(self) -> None:
        """Start the batch's thread; `submit` does it too when needed."""
        with self._lock:
            self._running()

    def stop(self) -> None:
        """End the thread for good; answers in flight and all later ones raise Unavailable."""
        with self._lock:
            self._stopped = True
            manager, self._manager = self._manager, None
            requests, self._requests = self._requests, {}
        for request in requests.values():
            request.outputs.put(None)
        if manager is not None:
            manager.stop(block=True, timeout=30, hard_stop=True)

    def runs(self, manager: object) -> bool:
        """Whether this manager is the one at work and its thread is alive."""
        current = self._manager
        return current is manager and current is not None and current.is_running()

    @property
    def in_flight(self) -> int:
        """Answers that hold a place."""
        return len(self._requests)

    def submit(self, prompt: list[int], shift: ShiftUse, sampling: Sampling) -> Answer:
        """Queue one answer.

        Raises Busy when all places are taken, InvalidPrompt when prompt and answer cannot fit the
        model's context or the cache.
        """
        room = min(self._base.context, self.settings.cache_tokens // 2)
        if len(prompt) + sampling.max_new_tokens > room:
            raise InvalidPrompt(
                f"the prompt has {len(prompt)} tokens; with {sampling.max_new_tokens} for the answer "
                f"that is over the {room} that fit"
            )
        request = self._request(prompt, shift, sampling)
        with self._lock:
            if len(self._requests) >= self.settings.max_requests:
                raise Busy("the cloud is answering as many as it can; try again", retry_ms=_BUSY_MS)
            manager = self._running()
            request_id = f"r{next(self._numbers)}"
            self._requests[request_id] = request
        accepted = manager.add_request(
            prompt,
            request_id=request_id,
            max_new_tokens=sampling.max_new_tokens,
            streaming=True,
            eos_token_id=list(self.end_ids),
        )
        if accepted is None:
            self.forget(request_id)
            raise Unavailable("the cloud is restarting its engine; ask again")
        return Answer(self, request_id, request, sampling, manager=manager)

    def forget(self, request_id: str, *, running: bool = True) -> None:
        """Drop a request and all that is held for it; take it out of the batch if it may be there."""
        known = self._requests.pop(request_id, None) is not None
        manager = self._manager
        if known and running and manager is not None:
            manager.cancel_request(request_id)

    # -- called by the batch's thread -----------------------------------------------------------

    def deliver(self, output: Any) -> None:
        """Hand a generation output to whoever reads that answer."""
        request = self._requests.get(output.request_id)
        if request is not None:
            request.outputs.put(output)

    def book(self, scheduled: list[Any]) -> list[Group]:
        """Groups for the prompt positions that this packed batch prefills; empty in a decode step."""
        owners: dict[tuple[str, bool], list[tuple[list[int], _Request]]] = {}
        row = 0
        for future in scheduled:
            count = future.query_length
            # prepare_batch_tensors has already moved the offset past this query.
            start = future.state.position_offset - count
            request = self._requests.get(future.state.request_id)
            if request is not None and request.artefact and start < request.prompt_tokens:
                rows = [row + p - start for p in request.positions if start <= p < start + count]
                if rows:
                    key = (request.artefact, request.personal is not None)
                    owners.setdefault(key, []).append((rows, request))
            row += count
        return [self._group(*key, members) for key, members in owners.items()]

    def samplers(self, scheduled: list[Any]) -> list[tuple[int, Sampler]]:
        """(row of the logits, sampler) of the requests in this batch that sample."""
        found = []
        new = [future for future in scheduled if future.has_new_token]
        for row, future in enumerate(new):
            request = self._requests.get(future.state.request_id)
            if request is not None and request.sampler is not None:
                found.append((row, request.sampler))
        return found

    # -- helpers --------------------------------------------------------------------------------

    def _group(self, artefact: str, is_personal: bool, members: list[tuple[list[int], _Request]]) -> Group:
        index, valid = row_index([rows for rows, _ in members], self._base.device)
        shifts = [r.personal for _, r in members if r.personal is not None]
        return Group(index, valid, self._collective[artefact], stack(shifts) if is_personal else None)

    def _request(self, prompt: list[int], shift: ShiftUse, sampling: Sampling) -> _Request:
        name = "" if shift.mode is Mode.BASE or shift.artefact is None else shift.artefact.name
        personal = to_torch(shift.personal, self._base.device) if name and shift.personal else None
        return _Request(
            prompt_tokens=len(prompt),
            positions=tuple(self._positions[name].indices(len(prompt))) if name else (),
            artefact=name,
            personal=personal,
            sampler=Sampler(sampling) if sampling.temperature > 0 else None,
            outputs=queue.SimpleQueue(),
        )

    def _running(self) -> _Manager:
        """The manager, started anew if its thread died. Called under the lock."""
        if self._stopped:
            raise Unavailable("the cloud is stopping; try again later")
        if self._manager is None or not self._manager.is_running():
            self._manager = _Manager(self._model, self)
            self._manager.start()
        return self._manager


class _Router(OutputRouter):  # type: ignore[misc]
    def __init__(self, engine: GenerationEngine) -> None:
        super().__init__()
        self._engine = engine

    def deliver(self, output: Any) -> None:
        self._engine.deliver(output)

    def deliver_batch(self, outputs: list[Any]) -> None:
        for output in outputs:
            self._engine.deliver(output)


class _PerRequestSampling(ContinuousBatchingLogitsProcessorList):  # type: ignore[misc]
    """Replaces the rows of requests that sample; the manager itself always takes the arg-max."""

    def __init__(self, manager: _Manager, engine: GenerationEngine) -> None:
        super().__init__(LogitsProcessorList())
        self.do_processing = True
        self._manager, self._engine = manager, engine

    def __call__(self, _ids: torch.Tensor, logits: torch.Tensor, _args: Any) -> torch.Tensor:
        for row, sampler in self._engine.samplers(self._manager.scheduled()):
            token = sampler.draw(logits[row])
            logits[row].fill_(-torch.inf)
            logits[row, token] = 0
        return logits


def _paged_eager(  # noqa: PLR0917 - the library calls it so
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    attention_mask: torch.Tensor | None, scaling: float | None = None, **kwargs: Any,
) -> Any:  # fmt: skip
    """The family's own eager attention over paged keys and values.

    The library's version of "paged|eager" drops what a family adds to its attention, such as
    Gemma 2's soft-capping of scores.
    """
    cache = kwargs.pop("cache")
    key, value = cache.update(
        key_states=key, value_states=value, layer_idx=module.layer_idx, kwargs=kwargs
    )  # fmt: skip
    own = sys.modules[type(module).__module__].eager_attention_forward
    return own(module, query, key, value, attention_mask, scaling=scaling, **kwargs)


class _Manager(ContinuousBatchingManager):  # type: ignore[misc]
    """The library's manager with a book around every forward pass."""

    def __init__(self, model: Any, engine: GenerationEngine) -> None:
        settings = engine.settings
        ALL_ATTENTION_FUNCTIONS.register("paged|eager", _paged_eager)
        super().__init__(
            model=model,
            generation_config=GenerationConfig(do_sample=False, eos_token_id=sorted(engine.end_ids) or -1),
            continuous_batching_config=ContinuousBatchingConfig(
                page_size=_PAGE,
                num_blocks=settings.cache_tokens // _PAGE,
                max_batch_tokens=settings.batch_tokens,
                max_requests_per_batch=settings.max_requests,
                # A shared prefix would carry one user's shifted keys and values into another's.
                allow_block_sharing=False,
                use_async_batching=False,
                use_cuda_graph=False,  # Python hooks do not run when a graph is replayed
                auto_switch_to_flash=False,
            ),
        )
        self.output_router = _Router(engine)
        self.logit_processor = _PerRequestSampling(self, engine)
        self._engine = engine

    def scheduled(self) -> list[Any]:
        """Requests of the batch at hand, in the order of their rows."""
        processor = self.batch_processor
        return [] if processor is None else list(processor.inputs_and_outputs.requests_in_batch)

    def _generation_step(self) -> None:
        with open_book(self._engine.book(self.scheduled())):
            super()._generation_step()
