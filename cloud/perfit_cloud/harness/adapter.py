"""Our model with a shift, as lm-eval-harness asks one: log-likelihoods and answers.

φ acts on the prompt's positions, as the artefact's spec has them; the context of a request is the prompt.
Tokens are those of lm-eval's own class for Hugging Face models, so without a shift the figures are its too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor

from perfit_cloud.engine.generation.offline import generate_all
from perfit_cloud.engine.gradients.batch import PASS_TOKENS, Batch, Pair, group_all, make_batch, passes
from perfit_cloud.engine.interface import ShiftUse
from perfit_cloud.model.base import BaseModel
from perfit_cloud.model.forward import decoder_output, forward, rows_of, slice_rows, sliced_logits
from perfit_cloud.model.interventions import active_interventions, hooked, to_torch
from perfit_shared.errors import InvalidInput
from perfit_shared.positions import Positions
from perfit_shared.types import Mode, Sampling

__all__ = ["ShiftedModel"]

_ANSWER_TOKENS = 256  # lm-eval's own limit where a task names none
_LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # lm-eval's words for it
Request = tuple[Any, list[int], list[int]]  # what it was made of, context ids, continuation ids


class ShiftedModel(TemplateLM):  # type: ignore[misc]  # lm-eval has no types
    """`use` in BASE mode is the untouched model."""

    backend = "causal"

    def __init__(self, base: BaseModel, use: ShiftUse) -> None:
        super().__init__()
        self._base = replace(base, model=base.share_weights())
        self._use, self.tokenizer = use, base.tokenizer
        artefact = None if use.mode is Mode.BASE else use.artefact
        self._positions, self._collective, self._personal = Positions(0, 0), {}, None
        if artefact is not None:
            self._positions = Positions.parse(artefact.spec.positions)
            self._collective = to_torch(artefact.collective, base.device)
            self._personal = None if use.personal is None else to_torch(use.personal, base.device)

    # -- tokens --------------------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What stands for an empty context."""
        first = self.tokenizer.bos_token_id
        return self.eot_token_id if first is None else int(first)

    @property
    def tokenizer_name(self) -> str:
        return self._base.name

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """As lm-eval's own: what the tokenizer puts in front, unless the text begins with it."""
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self.tokenizer.decode(self.prefix_token_id))
        return list(self.tokenizer.encode(string, add_special_tokens=add_special_tokens))

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    # -- log-likelihoods -----------------------------------------------------------------------

    def _loglikelihood_tokens(self, requests: Sequence[Request], **_: Any) -> list[tuple[float, bool]]:
        """(log-likelihood in nats, whether it is the greedy answer) of each continuation."""
        pairs = [self._fitting(context, continuation) for _, context, continuation in requests]
        found: list[tuple[float, bool]] = [(0.0, False)] * len(pairs)
        with torch.no_grad(), hooked(self._base.model, self._collective):
            for chunk in passes(pairs, self._base.capabilities.passes, PASS_TOKENS):
                for i, result in zip(chunk, self._score([pairs[i] for i in chunk]), strict=True):
                    found[i] = result
        return found

    def _fitting(self, context: list[int], continuation: list[int]) -> Pair:
        """What is too long loses its beginning, as in lm-eval."""
        room = self._base.context + 1 - len(continuation)  # the last token is only predicted
        if room < 1:
            raise InvalidInput(f"a task's answer of {len(continuation)} tokens does not fit the context")
        return context[-room:], continuation

    def _score(self, pairs: Sequence[Pair]) -> Iterator[tuple[float, bool]]:
        batch = make_batch(pairs, self._positions, self._base.device)
        groups = group_all(batch, self._collective, self._personal)
        row, column = (batch.labels != -100).nonzero(as_tuple=True)
        labels = batch.labels[row, column]
        before = column + batch.input_ids.shape[1] - batch.labels.shape[1] - 1
        likely, greedy = [], []
        with active_interventions(groups):
            slices = self._logits(batch, (row, before))
            for logits, of_slice in zip(slices, torch.split(labels, self._slice), strict=True):
                scores = logits.float().log_softmax(-1)
                likely.append(scores.gather(-1, of_slice.unsqueeze(-1)).squeeze(-1))
                greedy.append(scores.argmax(-1) == of_slice)
        sizes = [len(target) for _, target in pairs]
        for own, hits in zip(
            torch.split(torch.cat(likely), sizes), torch.split(torch.cat(greedy), sizes), strict=True
        ):
            yield float(own.double().sum()), bool(hits.all())

    @property
    def _slice(self) -> int:
        return slice_rows(self._base.model.config.get_text_config().vocab_size)

    def _logits(self, batch: Batch, rows: tuple[Tensor, Tensor]) -> Iterator[Tensor]:
        """Logits after these positions, `_slice` rows at a time."""
        model, can = self._base.model, self._base.capabilities
        masks = {"attention_mask": batch.attention_mask, "position_ids": batch.position_ids}
        if not can.in_slices:
            output = forward(model, can.arguments, batch.input_ids, **masks)
            yield from torch.split(output.logits[rows], self._slice)
            return
        output = decoder_output(model, can.arguments, batch.input_ids, **masks)
        for part in torch.split(rows_of(output[0], rows), self._slice):
            yield sliced_logits(model, can.arguments, output, part).to(rows[0].device)

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, in windows of the context. What a window follows is its prompt."""
        windows, counts = [], []
        for request in requests:
            (text,) = request.args
            own = get_rolling_token_windows(
                self.tok_encode(text), self.prefix_token_id, self._base.context, context_len=1
            )
            made = [(None, *make_disjoint_window(window)) for window in own]
            windows += made
            counts.append(len(made))
        scores = iter(self._loglikelihood_tokens(windows))
        return [sum(next(scores)[0] for _ in range(count)) for count in counts]

    # -- answers -------------------------------------------------------------------------------

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Answers up to any of a task's stop texts, greedy unless it asks to draw."""
        asked = []
        for request in requests:
            context, arguments = request.args
            sampling = _sampling(arguments)
            room = self._base.context - sampling.max_new_tokens
            if room < 1:
                raise InvalidInput(
                    f"a task asks for {sampling.max_new_tokens} tokens, the context has {self._base.context}"
                )
            ids = self.tok_encode(context) or [self.prefix_token_id]
            asked.append((ids[-room:], sampling))
        prompts, samplings = [ids for ids, _ in asked], [sampling for _, sampling in asked]
        return generate_all(self._base, prompts, [self._use] * len(asked), samplings)


def _sampling(arguments: Mapping[str, Any]) -> Sampling:
    until = arguments.get("until") or ()
    limit = next((arguments[name] for name in _LIMITS if arguments.get(name) is not None), _ANSWER_TOKENS)
    temperature = float(arguments.get("temperature") or 0.0)
    draws = arguments.get("do_sample", temperature > 0)
    return Sampling(
        max_new_tokens=int(limit),
        temperature=(temperature or 1.0) if draws else 0.0,
        top_k=int(arguments.get("top_k") or 0),
        top_p=float(arguments.get("top_p") or 1.0),
        stop=tuple(text for text in ([until] if isinstance(until, str) else until) if text),
    )
