"""Requests for the tests of generation, and what each should get alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from perfit_cloud.engine.interface import Engine, GenerationSettings, ShiftUse
from perfit_shared.positions import Positions
from perfit_shared.types import Finish, Mode, Sampling
from tests.support.models import random_shift

SMALL = GenerationSettings(cache_tokens=2048, batch_tokens=24, max_requests=16)  # forces chunked prefill
NEW = 12


def prompts(count: int, vocabulary: int = 250) -> list[list[int]]:
    """Prompts of 1 to about 50 tokens, so that positions halve in some and prefill is chunked in others."""
    rng = np.random.default_rng(5)
    lengths = [1, 2, 3, 5, 8, 13, 30, 50]
    return [[0, *rng.integers(3, vocabulary, lengths[i % len(lengths)] - 1).tolist()] for i in range(count)]


def alone(base: Any, prompt: list[int], use: ShiftUse, new: int = NEW) -> list[int]:
    """Greedy `generate` of one request with φ₂∘φ₁ written out by hand in a hook on the prompt pass."""
    ids = torch.tensor([prompt])
    handles = []

    def hook(layer: int) -> Any:
        def apply(_m: Any, _a: Any, output: Any) -> Any:
            hidden = output[0] if isinstance(output, tuple) else output
            if hidden.shape[1] != len(prompt) or len(prompt) == 1:
                return None  # a decode step; and a one-token prompt has no positions
            hidden = hidden.clone()
            for p in Positions.parse(use.artefact.spec.positions).indices(len(prompt)):
                x = hidden[0, p].double()
                for tensors in (use.artefact.collective, use.personal):
                    if tensors is not None:
                        r, w, b = (torch.tensor(t).double() for t in tensors.layers[layer])
                        x = x + r.T @ (w @ x + b - r @ x)
                hidden[0, p] = x.to(hidden.dtype)
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        return apply

    if use.artefact is not None:
        from perfit_cloud.model.blocks import block_list

        handles = [block_list(base.model)[i].register_forward_hook(hook(i)) for i in use.artefact.spec.layers]
    try:
        out = base.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, pad_token_id=2
        )
    finally:
        for handle in handles:
            handle.remove()
    return out[0, len(prompt) :].tolist()


def serve(engine: Engine, wanted: list[tuple[list[int], ShiftUse, Sampling]]) -> list[list[int]]:
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
