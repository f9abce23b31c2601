"""Personal training as PerFit's reference stack does it: one user, a full forward and backward a step.

What pyreft under the Hugging Face trainer computes, in torch alone, without their bookkeeping: hooks
on the intervened blocks of a frozen model, φ₁ and φ₂ as modules whose rotation goes through torch's
`orthogonal` parametrization (read twice a forward pass, as pyreft does), one set of weights for the
first and the last positions, whole padded sequences, the model's own loss over all its logits, and
AdamW with linear warm-up and decay and gradient clipping. Two traps are avoided, to its favour: no
weight decay, which would zero rotations, and rates that start above zero (ours, step by step).

    tensors, seconds = train(base, pairs, spec=…, collective=…, start=…, plan_batches=…, learning_rate=…, clip=0.3)
"""  # noqa: E501 - the call keeps its line

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal

from perfit_cloud.model.base import BaseModel
from perfit_cloud.model.blocks import block_list
from perfit_shared.optimizer import OptimizerConfig
from perfit_shared.positions import Positions
from perfit_shared.shifts import LayerShift, ShiftSpec, ShiftTensors
from perfit_shared.training import Schedule

__all__ = ["Batch", "Reference", "make_batch", "train"]

Pair = tuple[list[int], list[int]]  # (prompt ids, target ids)


class LowRankShift(nn.Module):
    """φ(x) = x + Rᵀ(Wx + b − Rx) for x (…, d), in float32; R is a parametrized weight (d, r)."""

    def __init__(self, start: LayerShift) -> None:
        super().__init__()
        rank, hidden_size = start.rotation.shape
        self.source = nn.Linear(hidden_size, rank)
        self.rotation = orthogonal(nn.Linear(rank, hidden_size, bias=False))
        with torch.no_grad():
            self.source.weight.copy_(torch.tensor(start.source))
            self.source.bias.copy_(torch.tensor(start.bias))
            columns = torch.tensor(start.rotation.T)  # Rᵀ (d, r)
            self.rotation.weight = columns
            # The setter completes R to a basis by QR, which may round; its first columns are R itself.
            self.rotation.parametrizations.weight[0].base[:, :rank] = columns

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        inner = self.source(wide) - wide @ self.rotation.weight
        return (wide + inner @ self.rotation.weight.T).to(x.dtype)

    @torch.no_grad()
    def tensors(self) -> LayerShift:
        """A copy of what it has learned."""
        parts = (self.rotation.weight.T.contiguous(), self.source.weight, self.source.bias)
        return LayerShift(*(part.cpu().numpy().copy() for part in parts))


@dataclass(frozen=True)
class Batch:
    """B pairs, padded on the right to T tokens."""

    inputs: Mapping[str, Tensor]  # input_ids, attention_mask and labels (B, T), −100 where no target is
    rows: Tensor  # intervened rows of the flattened (B · T)


def make_batch(pairs: Sequence[Pair], positions: Positions, device: torch.device) -> Batch:
    longest = max(len(prompt) + len(target) for prompt, target in pairs)
    ids = torch.zeros(len(pairs), longest, dtype=torch.long)
    mask, labels, rows = torch.zeros_like(ids), torch.full_like(ids, -100), []
    for b, (prompt, target) in enumerate(pairs):
        end = len(prompt) + len(target)
        ids[b, :end] = torch.tensor(prompt + target)
        mask[b, :end] = 1
        labels[b, len(prompt) : end] = torch.tensor(target)
        rows += [b * longest + i for i in positions.indices(len(prompt))]
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return Batch({k: v.to(device) for k, v in inputs.items()}, torch.tensor(rows, device=device))


class Reference:
    """A base model with trainable φ₂ over frozen φ₁ in hooks. `close` takes them off."""

    def __init__(self, base: BaseModel, collective: ShiftTensors, start: ShiftTensors) -> None:
        self._base = base
        self._rows: Tensor = torch.empty(0)
        self.personal = {layer: LowRankShift(s).to(base.device) for layer, s in start.layers.items()}
        self._collective = {
            layer: LowRankShift(s).to(base.device).requires_grad_(False)
            for layer, s in collective.layers.items()
        }
        blocks = block_list(base.model)
        self._handles = [blocks[i].register_forward_hook(self._hook(i)) for i in self.personal]

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()

    def parameters(self) -> list[nn.Parameter]:
        return [p for module in self.personal.values() for p in module.parameters()]

    def loss(self, batch: Batch) -> Tensor:
        """Mean loss over target tokens, nats."""
        self._rows = batch.rows
        loss: Tensor = self._base.model(**batch.inputs, use_cache=False).loss
        return loss

    def tensors(self) -> ShiftTensors:
        return ShiftTensors({layer: module.tensors() for layer, module in self.personal.items()})

    def _hook(self, layer: int) -> Any:
        def apply(_module: nn.Module, _args: Any, output: Any) -> Any:
            hidden = output[0] if isinstance(output, tuple) else output  # (B, T, d)
            flat = hidden.reshape(-1, hidden.shape[-1])
            x = self.personal[layer](self._collective[layer](flat[self._rows]))
            hidden = flat.index_copy(0, self._rows, x).view_as(hidden)
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        return apply


def train(
    base: BaseModel,
    pairs: Sequence[Pair],
    *,
    spec: ShiftSpec,
    collective: ShiftTensors,
    start: ShiftTensors,
    schedule: Schedule,
) -> tuple[ShiftTensors, float]:
    """One user's personal tensors after the steps of a schedule, whose rows are those of `pairs`; seconds.

    The seconds are of all that a user costs: modules, batches, steps.
    """
    begun = time.perf_counter()
    positions = Positions.parse(spec.positions)
    reference = Reference(base, collective, start)
    try:
        optimizer = torch.optim.AdamW(reference.parameters(), lr=schedule.learning_rate, weight_decay=0.0)
        for step in range(schedule.steps):
            batch = make_batch([pairs[row] for row in schedule.batch(step)], positions, base.device)
            with torch.enable_grad():
                reference.loss(batch).backward()
            nn.utils.clip_grad_norm_(reference.parameters(), OptimizerConfig.clip)
            for group in optimizer.param_groups:
                group["lr"] = schedule.rate(step)
            optimizer.step()
            optimizer.zero_grad()
        tensors = reference.tensors()
    finally:
        reference.close()
    return tensors, time.perf_counter() - begun
