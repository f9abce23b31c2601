"""Activations that training cannot change, cached by example, and passes built from them.

A shift changes hidden states from the first intervened token and the first intervened block on. So of
an example with prompt p and target t, a pass needs

    rows     the first intervened block's output, from the first intervened token to the target's last
             but one (the last is predicted, and predicts nothing);
    past     the keys and values of all earlier tokens at every later block.

With an "f" part in the positions the rows are all of the example and there is no past. Personal training
caches rows behind φ₁. Collective training changes φ₁, so it caches them before φ₁.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from perfit_cloud.engine.gradients.batch import BatchBudget, Pair
from perfit_cloud.model.devices import Copies
from perfit_cloud.model.interventions import Shift, ShiftGroup, shift_rows
from perfit_cloud.model.partial import Indices, Packing, PartialDecoder, ragged
from perfit_shared.positions import Positions

__all__ = ["ActivationCache", "Examples", "Joined", "Part", "build_cache", "cache_bytes", "join"]


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

    def marks_of(self, which: Indices) -> Indices:
        """The marks of these examples, one example behind another."""
        found: Indices = self.marks[ragged(self.first_mark[which], self.marked[which])]
        return found


@dataclass(frozen=True)
class ActivationCache:
    """Cached rows and pasts of some examples, one behind another. *Entry* i is the i-th example."""

    layer: int  # the first intervened block, whose output the rows are
    is_shifted: bool  # whether φ₁ of that block is applied to them
    hidden: Tensor  # (R, d)
    past: dict[int, tuple[Tensor, Tensor]]  # by later block: keys and values (Q, width)
    first_row: Indices  # by entry
    first_past: Indices
    devices: Sequence[torch.device]  # where each block of the model computes

    def erase(self) -> None:
        """Overwrite every number."""
        for tensor in (self.hidden, *(t for pair in self.past.values() for t in pair)):
            tensor.zero_()

    def moved(
        self, entries: Indices, rows: Indices, starts: Indices, device: torch.device
    ) -> ActivationCache:
        """Copy these entries, of so many rows and past tokens, to `device`, and pasts to their block's."""
        past_from = self.first_past[entries]

        def of_block(tensor: Tensor, block: int) -> Tensor:
            return _runs(tensor, past_from, starts, self.devices[block])

        return ActivationCache(
            layer=self.layer,
            is_shifted=self.is_shifted,
            hidden=_runs(self.hidden, self.first_row[entries], rows, device),
            past={
                block: (of_block(keys, block), of_block(values, block))
                for block, (keys, values) in self.past.items()
            },
            first_row=_first(rows),
            first_past=_first(starts),
            devices=self.devices,
        )


class Part(NamedTuple):
    """Examples of one owner, and their entries in a cache."""

    examples: Examples
    which: Indices
    cache: ActivationCache
    entries: Indices


# -- filling -----------------------------------------------------------------------------------------


def cache_bytes(decoder: PartialDecoder, examples: Examples, layer: int) -> Indices:
    """Bytes of each example in a cache."""
    of_row = decoder.hidden_size * decoder.dtype.itemsize
    of_past = 2 * decoder.past_width * decoder.dtype.itemsize * (decoder.blocks - layer - 1)
    taken: Indices = examples.rows * of_row + examples.starts * of_past
    return taken


def build_cache(
    decoder: PartialDecoder,
    examples: Examples,
    which: Indices,
    layer: int,
    budget: BatchBudget,
    *,
    collective: Shift | None,
    working: Callable[[], AbstractContextManager[Any]] = nullcontext,
    spill: bool = False,
) -> ActivationCache:
    """Compute rows and pasts of examples `which`, on their device or (`spill`) in host memory.

    Pasts are where their block computes. `layer` is the first intervened block. `collective` is the shift
    applied to its rows; None leaves them unshifted, so that φ₁ can be trained. `budget` bounds each pass.
    `working` is entered for each pass, and what it raises ends the build.
    """
    device = examples.ids.device
    rows, starts = examples.rows[which], examples.starts[which]

    def store(count: int, width: int, device: torch.device = device) -> Tensor:
        """Zeros, because passes fill it one by one, and an empty tensor shows what memory held before."""
        if spill:  # pinned, or a copy to the device would wait for the CPU
            return torch.zeros(count, width, dtype=decoder.dtype, pin_memory=device.type == "cuda")
        return torch.zeros(count, width, dtype=decoder.dtype, device=device)

    past_tokens = int(starts.sum())
    cache = ActivationCache(
        layer=layer,
        is_shifted=collective is not None,
        hidden=store(rows.sum(), decoder.hidden_size),
        past={
            later: (store(past_tokens, decoder.past_width, at), store(past_tokens, decoder.past_width, at))
            for later, at in enumerate(decoder.devices)
            if later > layer
        },
        first_row=_first(rows),
        first_past=_first(starts),
        devices=decoder.devices,
    )
    lengths = rows + starts
    try:
        for entries in budget.cut(lengths, lengths):
            with working(), torch.no_grad():
                _fill(decoder, Part(examples, which[entries], cache, entries), collective)
    except BaseException:
        cache.erase()
        raise
    return cache


def _fill(decoder: PartialDecoder, part: Part, collective: Shift | None) -> None:
    """Run whole examples up to the first intervened block, then their pasts through all later blocks."""
    examples, which, cache, entries = part
    device, store, layer = examples.ids.device, cache.hidden.device, cache.layer
    starts, rows = examples.starts[which], examples.rows[which]
    first = _first(starts + rows)  # of each example among the packed rows

    def index(of: Indices, count: Indices) -> Tensor:
        return torch.from_numpy(ragged(of, count)).to(device)

    none = np.zeros_like(starts)
    hidden = decoder.embed(examples.ids.index_select(0, index(examples.first_id[which], starts + rows)))
    hidden = decoder.run(hidden, range(layer + 1), Packing(none, starts + rows, device)).to(device)
    if collective is not None:
        marks = examples.marks_of(which) + np.repeat(first + starts, examples.marked[which])
        group = ShiftGroup(torch.from_numpy(marks).to(device).unsqueeze(0), None, collective, None)
        hidden = shift_rows(hidden, group, layer)
    there = index(cache.first_row[entries], rows).to(store)
    cache.hidden.index_copy_(0, there, hidden.index_select(0, index(first + starts, rows)).to(store))
    if not cache.past or not starts.any():
        return
    places = Copies(index(cache.first_past[entries], starts))

    def capture(block: int, keys: Tensor, values: Tensor) -> None:
        for cached, new in zip(cache.past[block], (keys, values), strict=True):
            cached.index_copy_(0, places.on(cached.device), new.to(cached.device))

    behind = starts > 0
    packing = Packing(none[behind], starts[behind], device, capture=capture)
    hidden = hidden.index_select(0, index(first, starts))
    # Only the last block's keys and values are used, not its output.
    decoder.run(hidden, range(layer + 1, decoder.blocks), packing, rows=there[:0])


# -- joining -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Joined:
    """Examples of U owners as one pass of N packed rows and M target tokens."""

    layer: int  # the first intervened block
    is_shifted: bool  # whether φ₁ of that block is applied
    hidden: Tensor  # (N, d), that block's output
    packing: Packing
    index: Tensor  # (U, k) packed rows of each owner's marks
    valid: Tensor | None  # (U, k), None when every owner has k
    label_rows: Tensor  # (M,) packed rows that predict a target token
    labels: Tensor  # (M,) the tokens
    label_owners: Indices  # (M,) 0 … U − 1

    def run(self, decoder: PartialDecoder, collective: Shift, personal: Shift | None) -> Tensor:
        """The last block's output at `label_rows`, (M, d), under φ₂∘φ₁; without tensors, the model's own."""
        both = ShiftGroup(self.index, self.valid, collective, personal)
        first = ShiftGroup(self.index, self.valid, personal or {}, None) if self.is_shifted else both
        hidden = shift_rows(self.hidden, first, self.layer)
        blocks = range(self.layer + 1, decoder.blocks)
        return decoder.run(hidden, blocks, self.packing, groups=[both], rows=self.label_rows)


def join(parts: Sequence[Part], owners: Sequence[int], device: torch.device) -> Joined:
    """`owners` (0 … U − 1, ascending) says whose each part is."""
    prompts, targets, starts, rows, marked = (
        np.concatenate(_of_parts(parts, name)) for name in ("prompts", "targets", "starts", "rows", "marked")
    )
    first = _first(rows)
    owner = np.repeat(owners, [len(part.which) for part in parts])  # (B,)
    marks = np.concatenate([part.examples.marks_of(part.which) for part in parts])
    index, valid = _by_owner(marks + np.repeat(first, marked), np.repeat(owner, marked), owners[-1] + 1)
    hidden, labels = [], []
    for part in parts:
        examples, which = part.examples, part.which
        row_runs = ragged(part.cache.first_row[part.entries], examples.rows[which])
        hidden.append((part.cache.hidden, torch.from_numpy(row_runs).to(device)))
        label_runs = ragged(examples.first_label[which], examples.targets[which])
        labels.append((examples.ids, torch.from_numpy(label_runs).to(device)))
    return Joined(
        layer=parts[0].cache.layer,
        is_shifted=parts[0].cache.is_shifted,
        hidden=_gather(hidden),
        packing=Packing(starts, rows, device, past=_past(parts, device) if starts.any() else None),
        index=torch.from_numpy(index).to(device),
        valid=None if valid is None else torch.from_numpy(valid).to(device),
        label_rows=torch.from_numpy(ragged(first + prompts - 1 - starts, targets)).to(device),
        labels=_gather(labels),
        label_owners=np.repeat(owner, targets),
    )


def _of_parts(parts: Sequence[Part], name: str) -> list[Indices]:
    """A number of each example, by part."""
    return [getattr(part.examples, name)[part.which] for part in parts]


def _past(parts: Sequence[Part], device: torch.device) -> Callable[[int], tuple[Tensor, Tensor]]:
    """What Packing wants: keys and values (B · S, width) of a layer, pasts from slot 0."""
    starts = _of_parts(parts, "starts")
    longest_rows = max(rows.max() for rows in _of_parts(parts, "rows"))
    slots = np.arange(max(start.max() for start in starts) + longest_rows)  # (S,)
    indices = []
    for part, start in zip(parts, starts, strict=True):
        # Slots behind a past repeat its last token. Any finite numbers would do.
        index = part.cache.first_past[part.entries, None] + np.minimum(slots, start[:, None] - 1)
        indices.append(torch.from_numpy(index.reshape(-1)).to(device))

    def of_layer(layer: int) -> tuple[Tensor, Tensor]:
        pasts = [part.cache.past[layer] for part in parts]
        keys = _gather([(past[0], index) for past, index in zip(pasts, indices, strict=True)])
        values = _gather([(past[1], index) for past, index in zip(pasts, indices, strict=True)])
        return keys, values

    return of_layer


def _by_owner(rows: Indices, owner: Indices, owners: int) -> tuple[Indices, npt.NDArray[np.bool_] | None]:
    """(index, valid) of a ShiftGroup from rows sorted by owner, who are 0 … `owners` − 1."""
    counts = np.bincount(owner, minlength=owners)
    entries = np.arange(counts.max())
    index = rows[_first(counts)[:, None] + np.minimum(entries, counts[:, None] - 1)]
    return index, None if counts.min() == counts.max() else entries < counts[:, None]


def _gather(sources: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Rows `index` of each (tensor, index), one behind another; written once."""
    if len(sources) == 1:
        tensor, index = sources[0]
        return tensor.index_select(0, index.to(tensor.device))
    out = sources[0][0].new_empty(sum(len(index) for _, index in sources), *sources[0][0].shape[1:])
    at = 0
    for tensor, index in sources:
        torch.index_select(tensor, 0, index.to(tensor.device), out=out[at : at + len(index)])
        at += len(index)
    return out


def _runs(tensor: Tensor, first: Indices, counts: Indices, device: torch.device) -> Tensor:
    """Runs of rows of `tensor`, one behind another, on `device`."""
    out = tensor.new_empty(counts.sum(), tensor.shape[1], device=device)
    for begin, to, count in zip(first.tolist(), _first(counts).tolist(), counts.tolist(), strict=True):
        out[to : to + count].copy_(tensor[begin : begin + count], non_blocking=True)
    return out


def _first(counts: Indices) -> Indices:
    """Where each of several runs of these lengths begins."""
    return counts.cumsum() - counts
