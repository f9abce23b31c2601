"""Answers to several prompts at once by the library's own `generate`, each under its own shift.

For research, where all prompts are known beforehand, and to serve families that continuous batching
does not take. Prompts are padded on the left. The book of whose rows are shifted is open for one
forward pass, that of the prompts, and closed by its logits: decoded tokens are never intervened on.
Which prompts share a batch, and whether earlier tokens are kept, is as the family can (capabilities).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from perfit_cloud.engine.device_lock import DeviceLock
from perfit_cloud.engine.fairness import in_turns
from perfit_cloud.engine.generation.engine import Engine, GenerationRequest, GenerationSettings
from perfit_cloud.engine.generation.sampling import Sampler, draw
from perfit_cloud.engine.interface import Mode, Sampling, ShiftUse
from perfit_cloud.model.artefacts import Artefact
from perfit_cloud.model.base import BaseModel
from perfit_cloud.model.capabilities import Batching, left_padded
from perfit_cloud.model.interventions import (
    ShiftGroup,
    active_interventions,
    hooked,
    row_index,
    stack,
    to_torch,
)
from perfit_shared.errors import InvalidInput, InvalidPrompt
from perfit_shared.positions import Positions

__all__ = ["BatchedEngine", "generate_batch"]


def generate_batch(
    base: BaseModel, prompts: Sequence[list[int]], uses: Sequence[ShiftUse], samplings: Sequence[Sampling]
) -> list[str]:
    """The answer to each prompt under its shift and sampling, end of sequence and stop text cut off.

    Raises InvalidPrompt when a prompt is empty or does not fit the model's context together with its
    answer, InvalidInput unless there are as many uses and samplings as prompts.
    """
    if not len(prompts) == len(uses) == len(samplings):
        raise InvalidInput("every prompt needs one shift and one sampling")
    for prompt, sampling in zip(prompts, samplings, strict=True):
        if not prompt or len(prompt) + sampling.max_new_tokens > base.context:
            raise InvalidPrompt(
                f"a prompt has {len(prompt)} tokens; with {sampling.max_new_tokens} for the answer "
                f"it should have 1 to {base.context - sampling.max_new_tokens}"
            )
    model = base.share_weights()
    model.generation_config = GenerationConfig()  # what the model's folder suggests is not asked for
    answers = [_Answer(base, sampling) for sampling in samplings]
    with hooked(model, {layer for use in uses if use.artefact for layer in use.artefact.spec.layers}):
        asked = [(len(prompt), sampling) for prompt, sampling in zip(prompts, samplings, strict=True)]
        for chosen in _fitting(base.context, base.capabilities.answers, asked):
            members = [prompts[i] for i in chosen]
            groups = partial(_groups, members, [uses[i] for i in chosen], base.device)
            readers = [answers[i] for i in chosen]
            _generate(model, members, groups, readers, caches=base.capabilities.caches)
    return [answer.text for answer in answers]


class BatchedEngine(Engine):
    """Answers in batches: who comes while one runs waits for its end. For every family."""

    continuous = False

    def __init__(
        self,
        base: BaseModel,
        artefacts: Mapping[str, Artefact],
        settings: GenerationSettings,
        device_lock: DeviceLock | None = None,
    ) -> None:
        super().__init__(base, artefacts, settings, device_lock)
        # What the model's folder suggests is not asked for.
        self._model.generation_config = GenerationConfig()
        # `_share` is of the tokens of prompts and answers.

    def _has_work(self) -> bool:
        return bool(self._waiting)

    def _round(self) -> None:
        batching = self._base.capabilities.answers
        with self._changed:
            self._share.wanted_by(request.owner for request in self._waiting)
            members: list[GenerationRequest] = []
            later: list[GenerationRequest] = []
            for request in in_turns(self._waiting, self._share):
                span = _span([(len(r.prompt), r.sampling) for r in (*members, request)])
                fits = span <= self._base.context and span * (len(members) + 1) <= self.settings.cache_tokens
                fits &= not members or (
                    not self.settings.alone and batching.fits([len(members[0].prompt), len(request.prompt)])
                )
                (members if fits else later).append(request)
            self._waiting = deque(request for request in self._waiting if request in later)
        if not members:
            return
        for request in members:
            self._share.charge(request.owner, len(request.prompt) + request.sampling.max_new_tokens)
        prompts = [request.prompt for request in members]

        def groups(length: int) -> list[ShiftGroup]:
            starts = _starts(prompts, length)
            return self._groups(
                {
                    request: [start + p for p in request.positions]
                    for request, start in zip(members, starts, strict=True)
                }
            )

        streams = [_Stream(request, self._produced) for request in members]
        _generate(
            self._model,
            prompts,
            groups,
            streams,
            caches=self._base.capabilities.caches,
            between=self._device_lock.yield_to_waiting,
        )

    def _drop(self) -> None:
        """All that was held lay in `generate`."""


class _Reader(Protocol):
    """Who takes the tokens of one row."""

    sampler: Sampler | None
    most: int  # tokens

    @property
    def is_over(self) -> bool: ...
    def take(self, ids: list[int]) -> None: ...


class _Stream:
    """A row whose tokens go out as they come."""

    def __init__(
        self, request: GenerationRequest, produced: Callable[[GenerationRequest, int], bool]
    ) -> None:
        self.sampler, self.most = request.sampler, request.sampling.max_new_tokens
        self._request, self._produced = request, produced
        self._is_done = False

    @property
    def is_over(self) -> bool:
        return self._is_done or self._request.has_left

    def take(self, ids: list[int]) -> None:
        self._is_done = self._produced(self._request, ids[-1])


class _Answer:
    """A row whose text is wanted in the end."""

    def __init__(self, base: BaseModel, sampling: Sampling) -> None:
        self._base, self._sampling = base, sampling
        self._end_ids = frozenset(base.end_ids)
        self.sampler = Sampler(sampling) if sampling.temperature > 0 else None
        self.most = sampling.max_new_tokens
        self.is_over = False
        self.text = ""

    def take(self, ids: list[int]) -> None:
        """Look at all its tokens so far; sets `text` when the last of them ends it."""
        ended = ids[-1] in self._end_ids
        last = ended or len(ids) >= self.most
        if not last and not self._sampling.stop:
            return
        text = self._base.decode(ids[:-1] if ended else ids)
        stops = [at for stop in self._sampling.stop if (at := text.find(stop)) >= 0]
        if last or stops:
            self.text, self.is_over = text[: min(stops, default=len(text))], True


def _generate(
    model: Any,
    prompts: Sequence[list[int]],
    groups: Callable[[int], Sequence[ShiftGroup]],
    readers: Sequence[_Reader],
    *,
    caches: bool,
    between: Callable[[], None] = lambda: None,
) -> None:
    """One `generate` on a model whose hooks are on; calls `between` its passes.

    `groups` says whose rows a pass over so many tokens, padding included, shifts. Without caches every
    pass reads the prompts again, and they are shifted again.
    """
    ids, mask, _ = left_padded(prompts)
    with ExitStack() as book:

        def after(length: int) -> None:
            book.close()  # harmless when repeated
            if not caches:
                book.enter_context(active_interventions(groups(length + 1)))

        book.enter_context(active_interventions(groups(ids.shape[1])))
        model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=max(reader.most for reader in readers),
            do_sample=False,
            use_cache=caches,
            logits_processor=LogitsProcessorList([_Choice(readers, after=after, between=between)]),
            stopping_criteria=StoppingCriteriaList([_Ends(readers, ids.shape[1])]),
        )


def _groups(
    prompts: Sequence[list[int]], uses: Sequence[ShiftUse], device: torch.device, length: int
) -> list[ShiftGroup]:
    """The shifted rows of the flattened (B · length), one group for each artefact and mode."""
    owners: dict[tuple[int, Mode], list[tuple[list[int], ShiftUse]]] = {}
    for start, prompt, use in zip(_starts(prompts, length), prompts, uses, strict=True):
        if use.artefact is None or use.mode is Mode.BASE:
            continue
        rows = [start + p for p in Positions.parse(use.artefact.spec.positions).indices(len(prompt))]
        if rows:
            owners.setdefault((id(use.artefact), use.mode), []).append((rows, use))
    groups = []
    for members in owners.values():
        artefact = members[0][1].artefact
        personal = [to_torch(use.personal, device) for _, use in members if use.personal is not None]
        if artefact is not None:
            collective = to_torch(artefact.collective, device)
            index = row_index([rows for rows, _ in members], device)
            groups.append(ShiftGroup(*index, collective, stack(personal) if personal else None))
    return groups


def _starts(prompts: Sequence[list[int]], length: int) -> list[int]:
    """Where each prompt begins in the flattened (B · length) of rows that are padded on the left alone."""
    width = max(map(len, prompts))
    return [b * length + width - len(prompt) for b, prompt in enumerate(prompts)]


class _Choice(LogitsProcessor):  # type: ignore[misc]
    """Leaves the chosen token alone in the scores; `generate` takes the arg-max."""

    def __init__(
        self, readers: Sequence[_Reader], *, after: Callable[[int], None], between: Callable[[], None]
    ) -> None:
        self._readers, self._after, self._between = readers, after, between

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        self._after(ids.shape[1])
        self._between()
        samplers = [None if reader.is_over else reader.sampler for reader in self._readers]
        if any(samplers):
            chosen = draw(scores, samplers)
            scores.fill_(-torch.inf)
            scores[range(len(chosen)), chosen] = 0
        return scores


class _Ends(StoppingCriteria):  # type: ignore[misc]
    """Which answers are over; those run on, unread, until all are."""

    def __init__(self, readers: Sequence[_Reader], width: int) -> None:
        self._readers, self._width = readers, width

    def __call__(self, ids: Tensor, _scores: Any, **_: Any) -> Tensor:
        for reader, new in zip(self._readers, ids[:, self._width :].tolist(), strict=True):
            if not reader.is_over:
                reader.take(new)
        return torch.tensor([reader.is_over for reader in self._readers], device=ids.device)


def _span(requests: Sequence[tuple[int, Sampling]]) -> int:
    """Tokens of context that these (prompt tokens, sampling) take, run until the last of them is over."""
    return max(prompt for prompt, _ in requests) + max(s.max_new_tokens for _, s in requests)


def _fitting(
    context: int, batching: Batching, requests: Sequence[tuple[int, Sampling]]
) -> Iterator[list[int]]:
    """Requests (prompt tokens, sampling) that can run together within the context: all, mostly."""
    batch: list[int] = []
    for i in sorted(range(len(requests)), key=lambda i: requests[i][0]):
        together = [requests[j] for j in (*batch, i)]
        if batch and not (_span(together) <= context and batching.fits([n for n, _ in together])):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch
