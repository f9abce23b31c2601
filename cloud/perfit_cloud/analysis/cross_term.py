"""Proposition 3's cross term: how far the collective shift moves what the personal one does.

φᵢ(x) = x + vᵢ(x), so φ₂(φ₁(x)) = x + v₁(x) + v₂(x) + [v₂(x + v₁(x)) − v₂(x)]. The bracket over ‖v₁(x)‖ says
how nearly the two are independent: 0 where they add up.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from perfit_cloud.analysis.prompts import Prompts
from perfit_cloud.analysis.queries import AskingUser
from perfit_cloud.engine.gradients.batch import group_all, make_batch, passes
from perfit_cloud.model.artefacts import Artefact
from perfit_cloud.model.base import BaseModel
from perfit_cloud.model.blocks import block_list, hidden_of
from perfit_cloud.model.forward import decoder_output
from perfit_cloud.model.interventions import Phi, active_interventions, hooked, to_torch
from perfit_shared.errors import ShiftMismatch
from perfit_shared.positions import Positions
from perfit_shared.shifts import ShiftTensors

__all__ = ["CrossTerm", "cross_term", "measure_cross_terms"]

_MOST_USERS, _MOST_QUERIES = 100, 8


@dataclass(frozen=True)
class CrossTerm:
    """At one block, over users, prompts and positions."""

    block: int
    users: int
    rows: int
    median: float
    low: float  # 5 %
    high: float  # 95 %


def cross_term(x: Tensor, collective: Phi, personal: Phi) -> Tensor:
    """‖v₂(x + v₁(x)) − v₂(x)‖ / ‖v₁(x)‖ for x (U, k, d): (U, k), float32; 0 where v₁(x) is 0.

    v₂ is affine, so the difference is computed as R₂ᵀ(W₂ − R₂)v₁(x): x may be thousands of times as long.
    """
    first = (x.float() @ _map(collective).mT + collective.bias.unsqueeze(-2)) @ collective.rotation
    moved = (first @ _map(personal).mT) @ personal.rotation
    length = first.norm(dim=-1)
    return torch.where(length > 0, moved.norm(dim=-1) / length, torch.zeros_like(length))


def _map(shift: Phi) -> Tensor:
    return shift.source - shift.rotation


def measure_cross_terms(
    base: BaseModel,
    artefact: Artefact,
    personal: Mapping[str, ShiftTensors],
    users: Iterable[AskingUser],
    prompts: Prompts,
) -> list[CrossTerm]:
    """At every intervened block, on real hidden states: those before φ₁, with the shifts below in force.

    Of the first 100 users the first 8 queries each, alone; someone without an own shift has the seed.
    Raises ShiftMismatch for an artefact of another model.
    """
    if artefact.fingerprint != base.fingerprint:
        raise ShiftMismatch(f"artefact {artefact.name} was trained on another model than {base.name}")
    collective = to_torch(artefact.collective, base.device)
    seed = to_torch(artefact.seed, base.device)
    found: dict[int, list[Tensor]] = {layer: [] for layer in artefact.spec.layers}
    count = 0
    for user in islice(users, _MOST_USERS):
        own = to_torch(personal[user.user_id], base.device) if user.user_id in personal else seed
        encoded = [prompts.encode(question) for question in user.questions[:_MOST_QUERIES]]
        ids = [prompt.alone for prompt in encoded if prompt is not None]
        for layer, ratios in _of_user(base, artefact, ids, collective, own):
            found[layer].append(ratios)
        count += bool(ids)
    rows = {layer: torch.cat(ratios).double().numpy() for layer, ratios in found.items() if ratios}
    return [
        CrossTerm(layer, count, len(values), *(float(v) for v in np.quantile(values, [0.5, 0.05, 0.95])))
        for layer, values in rows.items()
    ]


@torch.no_grad()
def _of_user(
    base: BaseModel,
    artefact: Artefact,
    prompts: list[list[int]],
    collective: Mapping[int, Phi],
    personal: Mapping[int, Phi],
) -> list[tuple[int, Tensor]]:
    found: list[tuple[int, Tensor]] = []
    positions = Positions.parse(artefact.spec.positions)
    pairs: list[tuple[list[int], list[int]]] = [(ids, []) for ids in prompts]
    for chosen in passes(pairs, base.capabilities.passes) if pairs else ():
        batch = make_batch([pairs[i] for i in chosen], positions, base.device)
        groups = group_all(batch, collective, personal)
        if not groups:  # every prompt is a single token
            continue
        rows = groups[0].index.reshape(-1)

        def take(layer: int, rows: Tensor = rows) -> Any:
            def hook(_module: nn.Module, _args: Any, output: Any) -> None:
                hidden = hidden_of(output).to(base.device)
                x = hidden.reshape(-1, hidden.shape[-1])[rows].unsqueeze(0)
                found.append((layer, cross_term(x, collective[layer], personal[layer])[0].cpu()))

            return hook

        with ExitStack() as hooks:
            for layer in artefact.spec.layers:  # before `hooked`, so that they see what φ₁ gets
                block = block_list(base.model)[layer]
                hooks.callback(block.register_forward_hook(take(layer)).remove)
            hooks.enter_context(hooked(base.model, artefact.spec.layers))
            hooks.enter_context(active_interventions(groups))
            decoder_output(
                base.model,
                base.capabilities.arguments,
                batch.input_ids,
                attention_mask=batch.attention_mask,
                position_ids=batch.position_ids,
            )
    return found
