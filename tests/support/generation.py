"""Requests for the tests of generation, and what each should get alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from perfit_cloud.engine.interface import Engine, GenerationSettings, ShiftUse
from perfit_cloud.model.blocks import block_list, hidden_of, with_hidden
from perfit_cloud.model.capabilities import left_padded
from perfit_shared.positions import Positions
from perfit_shared.types import Finish, Mode, Sampling
from tests.support.models import random_shift

SMALL = GenerationSettings(cache_tokens=2048, batch_tokens=24, max_requests=16)  # forces chunked prefill
NEW = 12
Request = tuple[list[int], ShiftUse, Sampling]


def prompts(count: int, vocabulary: int = 250) -> list[list[int]]:
    """Prompts of 1 to about 50 tokens, so that positions halve in some and prefill is chunked in others."""
    rng = np.random.default_rng(5)
    lengths = [1, 2, 3, 5, 8, 13, 30, 50]
    return [[0, *rng.integers(3, vocabulary, lengths[i % len(lengths)] - 1).tolist()] for i in range(count)]


def alone(base: Any, prompt: list[int], use: ShiftUse, new: int = NEW) -> list[int]:
    """Greedy `generate` of one request with φ₂∘φ₁ written out by hand in a hook on the prompt pass."""
    ids = torch.tensor([prompt])
    with _shifted(base, prompt, use):
        out = base.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, pad_token_id=2
        )
    return out[0, len(prompt) :].tolist()


def forced(base: Any, prompt: list[int], answer: list[int], use: ShiftUse, rows: int = 1) -> torch.Tensor:
    """Logits (answer, V), float32, behind prompt and the answer so far, in a pass of so many equal rows."""
    with _shifted(base, prompt, use), torch.no_grad():
        logits = base.model(torch.tensor([[*prompt, *answer]] * rows)).logits
    return logits[0, len(prompt) - 1 : -1].float()


def batch_change(base: Any, texts: list[list[int]], new: int) -> float:
    """The most that a logit of the untouched model changes between prompts alone and all in one batch."""
    told = {"max_new_tokens": new, "do_sample": False, "pad_token_id": 2}
    told |= {"output_logits": True, "return_dict_in_generate": True}
    ids, mask, _ = left_padded(texts)
    together = base.model.generate(ids, attention_mask=mask, **told)
    most = 0.0
    for row, text in enumerate(texts):
        ids = torch.tensor([text])
        alone = base.model.generate(ids, attention_mask=torch.ones_like(ids), **told)
        new_ids = alone.sequences[0, len(text) :].tolist()
        for at, logits in enumerate(alone.logits):
            most = max(most, float((logits[0].float() - together.logits[at][row].float()).abs().max()))
            if new_ids[at] != int(together.sequences[row, mask.shape[1] + at]):
                break  # from here on they read different texts
    return most


def assert_parts_at_ties(base: Any, asked: list[Request], served: list[list[int]]) -> int:
    """Where an answer parts from the one alone, the two tokens were as close as a batch moves them.

    Returns how many answers do not part.
    """
    most, same = batch_change(base, [prompt for prompt, _, _ in asked], asked[0][2].max_new_tokens), 0
    for (prompt, use, sampling), got in zip(asked, served, strict=True):
        want = alone(base, prompt, use, sampling.max_new_tokens)
        part = next((at for at, (a, b) in enumerate(zip(got, want, strict=False)) if a != b), None)
        if part is None:
            same += 1
            continue
        logits = forced(base, prompt, want, use)[part]
        assert float(logits[want[part]] - logits[got[part]]) <= most, (use.mode, len(prompt), most)
    return same


@contextmanager
def _shifted(base: Any, prompt: list[int], use: ShiftUse) -> Iterator[None]:
    """The model with φ₂∘φ₁ written out by hand in hooks on passes over the prompt."""

    def hook(layer: int) -> Any:
        def apply(_m: Any, _a: Any, output: Any) -> Any:
            hidden = hidden_of(output)
            if hidden.shape[1] < len(prompt) or len(prompt) == 1:
                return None  # a decode step; and a one-token prompt has no positions
            hidden = hidden.clone()
            for p in Positions.parse(use.artefact.spec.positions).indices(len(prompt)):
                x = hidden[:, p].double()
                for tensors in (use.artefact.collective, use.personal):
                    if tensors is not None:
                        r, w, b = (torch.tensor(t).double() for t in tensors.layers[layer])
                        x = x + (x @ w.T + b - x @ r.T) @ r
                hidden[:, p] = x.to(hidden.dtype)
            return with_hidden(output, hidden)

        return apply

    layers = () if use.artefact is None else use.artefact.spec.layers
    handles = [block_list(base.model)[layer].register_forward_hook(hook(layer)) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def serve(engine: Engine, wanted: list[Request]) -> list[list[int]]:
    """All requests at once; token ids of every answer."""
    answers = [engine.submit(*w) for w in wanted]
    ids = []
    for answer in answers:
        for piece in answer:
            last = piece
        assert last.finish in (Finish.END, Finish.LENGTH)
        ids.append(answer.ids)
        assert last.answer_tokens == len(answer.ids)
    return ids


def uses(artefacts: dict[str, Any], count: int) -> list[ShiftUse]:
    """BASE, COLLECTIVE and PERSONAL in turn, over both artefacts, every person another."""
    out = []
    for i in range(count):
        artefact = list(artefacts.values())[i % 2]
        mode = list(Mode)[i % 3]
        personal = random_shift(artefact.spec, artefact.spec.personal_rank, 100 + i)
        out.append(
            ShiftUse(
                mode, artefact if mode is not Mode.BASE else None, personal if mode is Mode.PERSONAL else None
            )
        )
    return out
