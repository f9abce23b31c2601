"""Static batches: several prompts at once by the library's own `generate`, each under its own shift.

For families that continuous batching does not take, and for research that puts hooks of its own on the
model. Prompts are padded on the left. Shifts are active for one forward pass, that of the prompts:
decoded tokens are never intervened on. The family's capabilities say which prompts may share a batch, and
whether `generate` may cache keys and values between passes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

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
from perfit_cloud.engine.fairness import round_robin
from perfit_cloud.engine.generation.engine import GenerationRequest, OwnEngine, intervention
from perfit_cloud.engine.generation.sampling import Likelihood, Sampler, draw, forget, likelihoods
from perfit_cloud.engine.generation.stream import WholeText
from perfit_cloud.engine.interface import GenerationSettings, ShiftUse
from perfit_cloud.model.artefacts import Artefact
from perfit_cloud.model.base import BaseModel
from perfit_cloud.model.capabilities import Batching, left_padded
from perfit_cloud.model.devices import input_device
from perfit_cloud.model.interventions import (
    Intervention,
    ShiftGroup,
    active_interventions,
    groups_of,
    hooked,
    to_torch,
)
from perfit_shared.errors import InvalidInput, InvalidPrompt
from perfit_shared.types import Sampling

__all__ = ["BatchedEngine", "generate_batch"]


def generate_batch(
    base: BaseModel,
    prompts: Sequence[list[int]],
    uses: Sequence[ShiftUse],
    samplings: Sequence[Sampling],
    *,
    model: Any = None,
) -> list[str]:
    """The answer to each prompt under its shift and sampling, end of sequence and stop text cut off.

    `model`: a module tree of the base's weights whose own hooks run too; else a fresh one.

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
    artefacts = {id(use.artefact): use.artefact for use in uses if use.artefact is not None}
    collective = {key: to_torch(artefact.collective, base.device) for key, artefact in artefacts.items()}
    rows = [
        _TextRow(
            prompt, intervention(use, len(prompt), lambda of: collective[id(of)], base.device), sampling, base
        )
        for prompt, use, sampling in zip(prompts, uses, samplings, strict=True)
    ]
    model = base.share_weights() if model is None else model
    model.generation_config = GenerationConfig()  # what the model's folder suggests is not asked for
    with hooked(model, {layer for artefact in artefacts.values() for layer in artefact.spec.layers}):
        asked = [(len(row.prompt), row.sampling) for row in rows]
        for chosen in _fitting(base.context, base.capabilities.answers, asked):
            _generate(model, [rows[i] for i in chosen], caches=base.capabilities.caches)
    return [row.text for row in rows]


class BatchedEngine(OwnEngine):
    """Static batches, for every family. A request that comes while one runs waits for its end."""

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
        self._model = self._hooked(base, artefacts)
        self._model.generation_config = GenerationConfig()

    def _has_work(self) -> bool:
        return bool(self._waiting)

    def _round(self) -> None:
        members = self._admitted()
        for request in members:  # `_share` is of the tokens of prompts and answers
            self._share.charge(request.owner, len(request.prompt) + request.sampling.max_new_tokens)
        if members:
            _generate(
                self._model,
                [_StreamedRow(request, self._produced, lambda: self._is_stopped) for request in members],
                caches=self._base.capabilities.caches,
                between=self._device_lock.yield_to_waiting,
            )

    def _admitted(self) -> list[GenerationRequest]:
        """Those of who waits that can run together, the owners who had least first."""
        with self._changed:
            self._share.wanted_by(request.owner for request in self._waiting)
            members: list[GenerationRequest] = []
            later: list[GenerationRequest] = []
            for request in round_robin(self._waiting, self._share):
                (members if self._fits(members, request) else later).append(request)
            self._waiting = deque(request for request in self._waiting if request in later)
        return members

    def _fits(self, members: Sequence[GenerationRequest], request: GenerationRequest) -> bool:
        """Whether `request` can run beside `members`."""
        span = _span([(len(r.prompt), r.sampling) for r in (*members, request)])
        if span > self._base.context or span * (len(members) + 1) > self.settings.cache_tokens:
            return False
        if not members:
            return True
        lengths = [len(members[0].prompt), len(request.prompt)]
        return not self.settings.alone and self._base.capabilities.answers.fits(lengths)

    def _drop(self) -> None:
        """Nothing: all that was held lay in `generate`."""


class _Row(ABC):
    """One answer of a batch: what it is made from, and who takes its tokens."""

    def __init__(
        self, prompt: list[int], shift: Intervention, sampling: Sampling, sampler: Sampler | None
    ) -> None:
        self.prompt, self.shift, self.sampling, self.sampler = prompt, shift, sampling, sampler

    @property
    @abstractmethod
    def is_over(self) -> bool:
        """Whether nobody wants more of its tokens."""

    @abstractmethod
    def take(self, token: int, likelihood: Likelihood | None) -> None:
        """Its next token."""


class _StreamedRow(_Row):
    """A row whose tokens are streamed."""

    def __init__(
        self,
        request: GenerationRequest,
        produced: Callable[[GenerationRequest, int, Likelihood | None], bool],
        is_stopped: Callable[[], bool],
    ) -> None:
        super().__init__(request.prompt, request.shift, request.sampling, request.sampler)
        self._request, self._produced, self._is_stopped = request, produced, is_stopped
        self._is_done = False

    @property
    def is_over(self) -> bool:
        return self._is_done or self._request.has_left or self._is_stopped()

    def take(self, token: int, likelihood: Likelihood | None) -> None:
        self._is_done = self._produced(self._request, token, likelihood)


class _TextRow(_Row):
    """A row whose whole text is wanted at the end."""

    def __init__(self, prompt: list[int], shift: Intervention, sampling: Sampling, base: BaseModel) -> None:
        super().__init__(prompt, shift, sampling, Sampler.of(sampling))
        self._answer = WholeText(base, len(prompt), sampling)

    @property
    def is_over(self) -> bool:
        return self._answer.is_over

    @property
    def text(self) -> str:
        return self._answer.text

    def take(self, token: int, likelihood: Likelihood | None) -> None:
        self._answer.put(token, likelihood)


def _generate(
    model: Any, rows: Sequence[_Row], *, caches: bool, between: Callable[[], None] = lambda: None
) -> None:
    """One `generate` on a model whose hooks are on; calls `between` its passes.

    Without caches every pass reads the prompts again, and they are shifted again.
    """
    prompts, device = [row.prompt for row in rows], input_device(model)
    ids, mask, _ = left_padded(prompts)

    def groups(length: int) -> list[ShiftGroup]:
        """What a pass over so many tokens, padding included, shifts."""
        starts = _starts(prompts, length)
        shifted = zip(starts, rows, strict=True)
        return groups_of(
            ((row.shift, [start + p for p in row.shift.positions]) for start, row in shifted), device
        )

    with ExitStack() as end, ExitStack() as active:
        end.callback(forget, [row.sampler for row in rows])

        def after(length: int) -> None:
            active.close()  # may be repeated
            if not caches:
                active.enter_context(active_interventions(groups(length + 1)))
            between()

        active.enter_context(active_interventions(groups(ids.shape[1])))
        choice = _Choice(rows, after)
        model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            max_new_tokens=max(row.sampling.max_new_tokens for row in rows),
            do_sample=False,
            use_cache=caches,
            logits_processor=LogitsProcessorList([choice]),
            stopping_criteria=StoppingCriteriaList([_Ends(rows, choice)]),
        )


def _starts(prompts: Sequence[list[int]], length: int) -> list[int]:
    """Where each prompt begins in the flattened (B · length) of rows that are padded on the left alone."""
    width = max(map(len, prompts))
    return [b * length + width - len(prompt) for b, prompt in enumerate(prompts)]


class _Choice(LogitsProcessor):  # type: ignore[misc]
    """Leaves the chosen token alone in the scores; `generate` takes the arg-max."""

    def __init__(self, rows: Sequence[_Row], after: Callable[[int], None]) -> None:
        """`after` is called behind every pass, with the tokens that a row has so far."""
        self._rows, self._after = rows, after
        self.likelihoods: Sequence[Likelihood | None] = [None] * len(rows)  # of the chosen tokens

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        self._after(ids.shape[1])
        samplers = [None if row.is_over else row.sampler for row in self._rows]
        wanted = [0 if row.is_over else row.sampling.logprobs for row in self._rows]
        if any(samplers) or any(wanted):
            chosen = draw(scores, samplers)
            self.likelihoods = likelihoods(scores, chosen, wanted)
            scores.fill_(-torch.inf)
            scores[range(len(chosen)), chosen] = 0
        return scores


class _Ends(StoppingCriteria):  # type: ignore[misc]
    """Hands out the chosen tokens. Rows that are over run on, unread, until all are."""

    def __init__(self, rows: Sequence[_Row], choice: _Choice) -> None:
        self._rows, self._choice = rows, choice

    def __call__(self, ids: Tensor, _scores: Any, **_: Any) -> Tensor:
        chosen = zip(self._rows, ids[:, -1].tolist(), self._choice.likelihoods, strict=True)
        for row, token, likelihood in chosen:
            if not row.is_over:
                row.take(token, likelihood)
        return torch.tensor([row.is_over for row in self._rows], device=ids.device)


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
