"""What no user's tensors can change of a training example, and passes put together from it.

A user's shift changes hidden states from the first intervened token and the first intervened block
on. So of an example with prompt p and target t, a step needs

    rows     the first intervened block's output, φ₁ applied, from the first intervened token to
             the target's last but one (the last is predicted, and predicts nothing);
    past     the keys and values of all earlier tokens at every later block.

With an "f" part in the positions the rows are all of the example and there is no past.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from perfit_cloud.engine.gradients.batch import BatchBudget, Pair
from perfit_cloud.model.interventions import Shift, ShiftGroup, shift_rows
from perfit_cloud.model.partial import Indices, Packing, PartialDecoder, ragged
from perfit_shared.positions import Positions

__all__ = ["ActivationCache", "Examples", "Joined", "Part", "join", "keep", "kept_bytes"]


class Examples:
    """E pairs as flat arrays. A *mark* is an intervened token, counted from its example's first row."""

    def __init__(self, pairs: Sequence[Pair], positions: Positions, device: torch.device) -> None:
        marks = [np.array(positions.indices(len(prompt)), dtype=np.int64) for prompt, _ in pairs]
        self.ids = torch.tensor([i for prompt, target in pairs for i in (*prompt, *target)], device=device)
        self.prompts = np.array([len(prompt) for prompt, _ in pairs])  # tokens
        self.targets = np.array([len(target) for _, target in pairs])
        self.first_id = _first(self.prompts + self.targets)
        self.first_label = self.first_id + self.prompts
        self.starts = np.array([m[0] if len(m) else 0 for m in marks])  # tokens of the past
        self.lengths = self.prompts + self.targets - 1  # tokens that are run through the model
        self.rows = self.lengths - self.starts
        self.marked = np.array([len(m) for m in marks])
        self.marks = np.concatenate([m - start for m, start in zip(marks, self.starts, strict=True)])
        self.first_mark = _first(self.marked)

    def pair(self, which: int) -> Pair:
        """One pair as lists again."""
        first, prompt = self.first_id[which], int(self.prompts[which])
        ids = self.ids[first : first + prompt + self.targets[which]].tolist()
        return ids[:prompt], ids[prompt:]


@dataclass(frozen=True)
class ActivationCache:
    """Rows and pasts of some examples, one behind another; *place* i is the i-th of them."""

    hidden: Tensor  # (R, d)
    past: dict[int, tuple[Tensor, Tensor]]  # by later block: keys and values (Q, width)
    first_row: Indices  # by place
    first_past: Indices

    def erase(self) -> None:
        """Overwrite every number."""
        for tensor in (self.hidden, *(t for pair in self.past.values() for t in pair)):
            tensor.zero_()

    def moved(self, places: Indices, rows: Indices, starts: Indices, device: torch.device) -> ActivationCache:
        """A copy on `device` of the examples at these places, which have so many rows and past tokens."""

        def copied(tensor: Tensor, first: Indices, counts: Indices) -> Tensor:
            out = tensor.new_empty(counts.sum(), tensor.shape[1], device=device)
            for at, to, count in np.stack([first[places], _first(counts), counts], 1).tolist():
                out[to : to + count].copy_(tensor[at : at + count], non_blocking=True)
            return out

        return ActivationCache(
            hidden=copied(self.hidden, self.first_row, rows),
            past={
                block: (copied(keys, self.first_past, starts), copied(values, self.first_past, starts))
                for block, (keys, values) in self.past.items()
            },
            first_row=_first(rows),
            first_past=_first(starts),
        )


class Part(NamedTuple):
    """Examples of one owner, and where what is kept of them lies."""

    examples: Examples
    which: Indices
    kept: ActivationCache
    places: Indices


def kept_bytes(tail: PartialDecoder, examples: Examples, layer: int) -> Indices:
    """Bytes that `keep` takes for each example."""
    of_row = tail.hidden_size * tail.dtype.itemsize
    of_past = 2 * tail.past_width * tail.dtype.itemsize * (tail.blocks - layer - 1)
    taken: Indices = examples.rows * of_row + examples.starts * of_past
    return taken


def keep(
    tail: PartialDecoder,
    examples: Examples,
    which: Indices,
    collective: Shift,
    caps: BatchBudget,
    *,
    working: Callable[[], AbstractContextManager[Any]] = nullcontext,
    spill: bool = False,
) -> ActivationCache:
    """Compute rows and pasts of examples `which`, to be kept on their device or (`spill`) in host memory.

    `caps`: of one pass. `working` is entered for each pass, and what it raises ends it.
    """
    layer, device = min(collective), examples.ids.device
    rows, starts = examples.rows[which], examples.starts[which]

    def store(count: int, width: int) -> Tensor:
        """Zeros: it is filled over many passes, and memory of tensors is given out as it was left."""
        if spill:  # locked in memory, or a copy from there would wait for the CPU
            return torch.zeros(count, width, dtype=tail.dtype, pin_memory=device.type == "cuda")
        return torch.zeros(count, width, dtype=tail.dtype, device=device)

    kept = ActivationCache(
        hidden=store(rows.sum(), tail.hidden_size),
        past={
            later: (store(starts.sum(), tail.past_width), store(starts.sum(), tail.past_width))
            for later in range(layer + 1, tail.blocks)
        },
        first_row=_first(rows),
        first_past=_first(starts),
    )
    lengths = rows + starts
    try:
        for places in caps.cut(lengths, lengths):
            with working(), torch.no_grad():
                _fill(tail, Part(examples, which[places], kept, places), collective)
    except BaseException:
        kept.erase()
        raise
    return kept


def _fill(tail: PartialDecoder, part: Part, collective: Shift) -> None:
    """Run whole examples up to the first intervened block and, for their pasts, the past on to the end."""
    examples, which, kept, places = part
    device, layer = examples.ids.device, min(collective)
    starts, rows = examples.starts[which], examples.rows[which]
    first = _first(starts + rows)  # of each example among the packed rows

    def index(of: Indices, count: Indices) -> Tensor:
        return torch.from_numpy(ragged(of, count)).to(device)

    none = np.zeros_like(starts)
    hidden = tail.embed(examples.ids.index_select(0, index(examples.first_id[which], starts + rows)))
    hidden = tail.run(hidden, range(layer + 1), Packing(none, starts + rows, device))
    marks = examples.marks[ragged(examples.first_mark[which], examples.marked[which])]
    if len(marks):
        marks = marks + np.repeat(first + starts, examples.marked[which])
        group = ShiftGroup(torch.from_numpy(marks).to(device).unsqueeze(0), None, collective, None)
        hidden = shift_rows(hidden, group, layer)
    store = kept.hidden.device
    there = index(kept.first_row[places], rows).to(store)
    kept.hidden.index_copy_(0, there, hidden.index_select(0, index(first + starts, rows)).to(store))
    if not kept.past or not starts.any():
        return
    there = index(kept.first_past[places], starts).to(store)

    def capture(block: int, keys: Tensor, values: Tensor) -> None:
        for kept_tensor, new in zip(kept.past[block], (keys, values), strict=True):
            kept_tensor.index_copy_(0, there, new.to(store))

    behind = starts > 0
    packing = Packing(none[behind], starts[behind], device, capture=capture)
    hidden = hidden.index_select(0, index(first, starts))
    # Nobody wants the last block's output, only its keys and values.
    tail.run(hidden, range(layer + 1, tail.blocks), packing, rows=there[:0].to(device))


@dataclass(frozen=True)
class Joined:
    """Examples of U owners as one pass of N packed rows and M target tokens."""

    hidden: Tensor  # (N, d), the first intervened block's output
    packing: Packing
    index: Tensor  # (U, k) packed rows of each owner's marks
    valid: Tensor | None  # (U, k), None when every owner has k
    label_rows: Tensor  # (M,) packed rows that predict a target token
    labels: Tensor  # (M,) the tokens
    label_owners: Indices  # (M,) 0 … U − 1


def join(parts: Sequence[Part], owners: Sequence[int], device: torch.device) -> Joined:
    """`owners` (0 … U − 1, ascending) says whose each part is."""

    def of_examples(name: str) -> Indices:
        return np.concatenate([getattr(part.examples, name)[part.which] for part in parts])

    prompts, targets, starts, rows, marked = map(
        of_examples, ("prompts", "targets", "starts", "rows", "marked")
    )
    first = _first(rows)
    owner = np.repeat(owners, [len(part.which) for part in parts])  # (B,)
    marks = np.concatenate(
        [p.examples.marks[ragged(p.examples.first_mark[p.which], p.examples.marked[p.which])] for p in parts]
    )
    index, valid = _by_owner(marks + np.repeat(first, marked), np.repeat(owner, marked), device)
    hidden, labels = (
        _gather([(tensor, torch.from_numpy(ragged(*at)).to(device)) for tensor, *at in sources])
        for sources in (
            [(p.kept.hidden, p.kept.first_row[p.places], p.examples.rows[p.which]) for p in parts],
            [(p.examples.ids, p.examples.first_label[p.which], p.examples.targets[p.which]) for p in parts],
        )
    )
    return Joined(
        hidden=hidden,
        packing=Packing(starts, rows, device, past=_past(parts, device) if starts.any() else None),
        index=index,
        valid=valid,
        label_rows=torch.from_numpy(ragged(first + prompts - 1 - starts, targets)).to(device),
        labels=labels,
        label_owners=np.repeat(owner, targets),
    )


def _past(parts: Sequence[Part], device: torch.device) -> Callable[[int], tuple[Tensor, Tensor]]:
    """What Packing wants: keys and values (B · S, width) of a layer, pasts from slot 0."""
    starts, rows = (
        [getattr(part.examples, name)[part.which] for part in parts] for name in ("starts", "rows")
    )
    slots = np.arange(max(map(np.max, starts)) + max(map(np.max, rows)))  # (S,)
    at = []
    for part, start in zip(parts, starts, strict=True):
        # Slots behind a past hold its last token again: any finite numbers do.
        index = part.kept.first_past[part.places, None] + np.minimum(slots, start[:, None] - 1)
        at.append(torch.from_numpy(index.reshape(-1)).to(device))

    def of_layer(layer: int) -> tuple[Tensor, Tensor]:
        keys, values = (
            _gather([(part.kept.past[layer][i], index) for part, index in zip(parts, at, strict=True)])
            for i in range(2)
        )
        return keys, values

    return of_layer


def _gather(sources: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Rows `index` of each (tensor, index), one behind another; written once."""
    if len(sources) == 1:
        tensor, index = sources[0]
        return tensor.index_select(0, index)
    out = sources[0][0].new_empty(sum(len(index) for _, index in sources), *sources[0][0].shape[1:])
    at = 0
    for tensor, index in sources:
        torch.index_select(tensor, 0, index, out=out[at : at + len(index)])
        at += len(index)
    return out


def _by_owner(rows: Indices, owner: Indices, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """(index, valid) of a Group from rows sorted by owner; everyone has at least one."""
    counts = np.bincount(owner)
    places = np.arange(counts.max())
    index = rows[_first(counts)[:, None] + np.minimum(places, counts[:, None] - 1)]
    valid = None if counts.min() == counts.max() else torch.from_numpy(places < counts[:, None]).to(device)
    return torch.from_numpy(index).to(device), valid


def _first(counts: Indices) -> Indices:
    """Where each of several runs of these lengths begins."""
    return counts.cumsum() - counts
