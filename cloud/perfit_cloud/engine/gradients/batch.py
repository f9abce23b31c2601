"""How work is cut into passes, and pairs as one padded batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from perfit_cloud.model.base import BaseModel
from perfit_cloud.model.capabilities import Batching, left_padded
from perfit_cloud.model.forward import token_losses
from perfit_cloud.model.interventions import Shift, ShiftGroup, active_interventions, row_index
from perfit_cloud.model.partial import Indices
from perfit_shared.positions import Positions

__all__ = [
    "PASS_TOKENS",
    "Batch",
    "BatchBudget",
    "Pair",
    "group_all",
    "make_batch",
    "most_pass_tokens",
    "passes",
    "target_log_likelihoods",
]

Pair = tuple[list[int], list[int]]  # (prompt ids, target ids)
PASS_TOKENS = 8192  # tokens (padding included) of one forward pass
_CPU_PASS_TOKENS = 512  # more makes no CPU pass cheaper, but others wait longer
_ANY = 2**62


def most_pass_tokens(device: torch.device) -> int:
    """The most tokens of one pass when several users wait for a device."""
    return _CPU_PASS_TOKENS if device.type == "cpu" else PASS_TOKENS


class BatchBudget(NamedTuple):
    """The most that one pass takes, unless it is a single example."""

    rows: int  # packed rows; activations for the backward pass grow with them
    keys: int = _ANY  # examples × longest example, tokens; attention's memory grows with them
    padding: int = _ANY  # attention scores, a head and block; above this another pass is cheaper
    batching: Batching = Batching.ANY_LENGTHS  # of whole examples

    @classmethod
    def of(cls, device: torch.device) -> BatchBudget:
        """Measured on two CPU cores, where 1,000 to 8,000 rows are alike; an accelerator wants more."""
        return cls(1024, 32_768, 2**17) if device.type == "cpu" else cls(8192, 32_768, 2**22)

    @classmethod
    def of_whole(cls, batching: Batching, tokens: int = PASS_TOKENS) -> Self:
        """For passes of whole examples, of so many tokens with their padding."""
        return cls(tokens, tokens, batching=batching)

    def within(self, tokens: int) -> BatchBudget:
        """The same, and no more rows than so many tokens; keys in proportion."""
        rows = min(self.rows, tokens)
        return self._replace(rows=rows, keys=max(rows, self.keys * rows // self.rows))

    def cut(self, rows: Indices, lengths: Indices) -> Iterator[Indices]:
        """Examples with these numbers of rows and tokens, shortest first, in as few passes as can be."""
        members: list[int] = []
        taken = scores = most = shortest = 0
        for example in np.argsort(lengths, kind="stable").tolist():
            row, length = int(rows[example]), int(lengths[example])
            shortest = shortest if members else length
            # What the pass holds with this example, which is its longest.
            taken, scores, most = taken + row, scores + row * length, max(most, row)
            keys = (len(members) + 1) * length
            fits = (
                taken <= self.rows
                and keys <= self.keys
                and keys * most - scores <= self.padding
                and self.batching.fits([shortest, length])
            )
            if members and not fits:
                yield np.array(members)
                members, taken, scores, most, shortest = [], row, row * length, row, length
            members.append(example)
        if members:
            yield np.array(members)


def passes(pairs: Sequence[Pair], batching: Batching, most: int = PASS_TOKENS) -> list[list[int]]:
    """Indices of all pairs, shortest first, in forward passes of at most `most` tokens when padded."""
    lengths = np.array([len(prompt) + len(target) for prompt, target in pairs], dtype=np.int64)
    return [chunk.tolist() for chunk in BatchBudget.of_whole(batching, most).cut(lengths, lengths)]


@dataclass(frozen=True)
class Batch:
    """B pairs, padded on the left to T tokens, targets right-aligned."""

    input_ids: Tensor  # (B, T)
    attention_mask: Tensor  # (B, T)
    position_ids: Tensor  # (B, T)
    labels: Tensor  # (B, K): target ids at the right, −100 elsewhere
    rows: list[list[int]]  # intervened rows of each pair in the flattened (B · T)


def make_batch(pairs: Sequence[Pair], positions: Positions, device: torch.device) -> Batch:
    longest = max(len(p) + len(t) for p, t in pairs)
    width = max(len(t) for _, t in pairs)
    ids, mask, position_ids = left_padded([[*prompt, *target] for prompt, target in pairs])
    labels = torch.full((len(pairs), width), -100)
    rows = []
    for b, (prompt, target) in enumerate(pairs):
        start = longest - len(prompt) - len(target)
        labels[b, width - len(target) :] = torch.tensor(target)
        rows.append([b * longest + start + i for i in positions.indices(len(prompt))])
    return Batch(ids.to(device), mask.to(device), position_ids.to(device), labels.to(device), rows)


def target_log_likelihoods(base: BaseModel, batch: Batch, groups: Sequence[ShiftGroup]) -> Tensor:
    """Log-likelihood of every target token, (B, K), zero where there is none."""
    row, column = (batch.labels != -100).nonzero(as_tuple=True)
    # A token is predicted by the position before it; columns of labels end where those of ids do.
    before = column + batch.input_ids.shape[1] - batch.labels.shape[1] - 1
    with active_interventions(groups):
        losses = token_losses(
            base.model,
            base.capabilities.arguments,
            batch.input_ids,
            rows=(row, before),
            labels=batch.labels[row, column],
            in_slices=base.capabilities.in_slices,
            attention_mask=batch.attention_mask,
            position_ids=batch.position_ids,
        )
    losses = losses.to(row.device)
    return losses.new_zeros(batch.labels.shape).index_put((row, column), -losses)


def group_all(batch: Batch, collective: Shift, personal: Shift | None) -> list[ShiftGroup]:
    """Every row of the batch under one owner's shift."""
    rows = [row for of_pair in batch.rows for row in of_pair]
    if not rows:
        return []
    index, valid = row_index([rows], batch.input_ids.device)
    return [ShiftGroup(index, valid, collective, personal)]
