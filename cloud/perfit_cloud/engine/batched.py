"""Answers to several prompts at once by the library's own `generate`, each under its own shift.

For research, where all prompts are known beforehand, and for families that continuous batching does
not take. Prompts are padded on the left. The book of whose rows are shifted is open for one forward
pass, that of the prompts, and closed by its logits: decoded tokens are never intervened on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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

from perfit_cloud.engine.sampling import Sampler
from perfit_cloud.engine.types import Mode, Sampling, ShiftUse
from perfit_cloud.model.base import BaseModel
from perfit_cloud.model.shifts import Group, hooked, open_book, row_index, stack, to_torch
from perfit_shared.errors import InvalidInput, InvalidPrompt
from perfit_shared.positions import Positions

__all__ = ["generate_batch"]


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
    model = base.twin()
    model.generation_config = GenerationConfig()  # what the model's folder suggests is not asked for
    answers = [_Answer(base, sampling) for sampling in samplings]
    with hooked(model, {layer for use in uses if use.artefact for layer in use.artefact.spec.layers}):
        for chosen in _fitting(base.context, prompts, samplings):
            _generate(
                model, [prompts[i] for i in chosen], [uses[i] for i in chosen], [answers[i] for i in chosen]
            )
    return [answer.text for answer in answers]


class _Answer:
    """One request while it is being answered."""

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
    model: Any, prompts: Sequence[list[int]], uses: Sequence[ShiftUse], answers: Sequence[_Answer]
) -> None:
    """One `generate` on a model whose hooks are on."""
    width = max(map(len, prompts))
    pads = [width - len(prompt) for prompt in prompts]
    ids = torch.tensor([[0] * pad + prompt for pad, prompt in zip(pads, prompts, strict=True)])
    mask = torch.tensor([[0] * pad + [1] * (width - pad) for pad in pads])
    with ExitStack() as book:
        book.enter_context(open_book(_groups(prompts, uses, width, model.device)))
        model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=max(answer.most for answer in answers),
            do_sample=False,
            use_cache=True,
            logits_processor=LogitsProcessorList([_Choice(answers, on_first=book.close)]),
            stopping_criteria=StoppingCriteriaList([_Ends(answers, width)]),
        )


def _groups(
    prompts: Sequence[list[int]], uses: Sequence[ShiftUse], width: int, device: torch.device
) -> list[Group]:
    """The shifted rows of the flattened (B · width), one group for each artefact and mode."""
    owners: dict[tuple[int, Mode], list[tuple[list[int], ShiftUse]]] = {}
    for b, (prompt, use) in enumerate(zip(prompts, uses, strict=True)):
        if use.artefact is None or use.mode is Mode.BASE:
            continue
        start = (b + 1) * width - len(prompt)
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
            groups.append(Group(*index, collective, stack(personal) if personal else None))
    return groups


class _Choice(LogitsProcessor):  # type: ignore[misc]
    """Replaces the scores of requests that sample by their draw; `generate` takes the arg-max."""

    def __init__(self, answers: Sequence[_Answer], *, on_first: Callable[[], None]) -> None:
        self._answers, self._on_first = answers, on_first

    def __call__(self, _ids: Tensor, scores: Tensor) -> Tensor:
        self._on_first()  # harmless when repeated
        at, samplers = [], []
        for b, answer in enumerate(self._answers):
            if answer.sampler is not None and not answer.is_over:
                at.append(b)
                samplers.append(answer.sampler)
        if at:
            logits = scores[at].cpu()  # one transfer for all
            drawn = [sampler.draw(row) for sampler, row in zip(samplers, logits, strict=True)]
            scores[at] = -torch.inf
            scores[at, drawn] = 0
        return scores


class _Ends(StoppingCriteria):  # type: ignore[misc]
    """Which answers are over; those run on, unread, until all are."""

    def __init__(self, answers: Sequence[_Answer], width: int) -> None:
        self._answers, self._width = answers, width

    def __call__(self, ids: Tensor, _scores: Any, **_: Any) -> Tensor:
        for answer, new in zip(self._answers, ids[:, self._width :].tolist(), strict=True):
            if not answer.is_over:
                answer.take(new)
        return torch.tensor([answer.is_over for answer in self._answers], device=ids.device)


def _fitting(
    context: int, prompts: Sequence[list[int]], samplings: Sequence[Sampling]
) -> Iterator[list[int]]:
    """Requests that can run until the last of them is over without leaving the context: all, mostly."""
    batch: list[int] = []
    for i in sorted(range(len(prompts)), key=lambda i: len(prompts[i])):
        more = [*batch, i]
        longest = max(len(prompts[j]) for j in more) + max(samplings[j].max_new_tokens for j in more)
        if batch and longest > context:
            yield batch
            more = [i]
        batch = more
    if batch:
        yield batch
