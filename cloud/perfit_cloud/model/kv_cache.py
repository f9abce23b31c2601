"""A cache of keys and values of requests in flight, and an attention that reads it in place.

Requests of similar size share one *pool* of slots: for every block, keys and values (slots, heads, size,
D). The slots in use always come first. So a decoding step attends over all requests of a pool in one call,
copies nothing, and pads only to the longest of them. A packed batch (1, N) holds any mix of decoding
rows and parts of prompts; everything but attention sees plain rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from perfit_cloud.model.attention import attend, hiding
from perfit_cloud.model.devices import Copies

__all__ = ["BatchMetadata", "KVCache", "Slot", "attend_over_cache"]

_ATTENTION = "perfit_kv_cache"
_SMALLEST = 32  # tokens of a slot
_FEWEST = 4  # slots of a new pool, if there is room


class Slot:
    """The slot of one request, and how many tokens are in it."""

    __slots__ = ("index", "length", "pool")

    def __init__(self, pool: _SlotPool, index: int) -> None:
        self.pool, self.index, self.length = pool, index, 0


class KVCache:
    """The cache of one model. Not thread-safe. `tokens`: how many all slots together may hold."""

    def __init__(self, tokens: int) -> None:
        self._tokens = tokens
        self._pools: dict[int, _SlotPool] = {}

    @property
    def held(self) -> int:
        """Tokens of the slots in use. May be read from another thread."""
        return sum(len(pool.slots) * pool.size for pool in list(self._pools.values()))

    def allocate(self, tokens: int) -> Slot | None:
        """A slot for a request of at most `tokens`; None when there is no room now.

        An empty cache has room for any request of up to half of all tokens.
        """
        size = max(min(_SMALLEST, self._tokens), 1 << (tokens - 1).bit_length())
        pool = self._pools.setdefault(size, _SlotPool(size))
        if len(pool.slots) == pool.capacity:
            free = self._tokens - sum(pool.capacity * pool.size for pool in self._pools.values())
            if free < size:
                for other in self._pools.values():
                    free += (other.capacity - len(other.slots)) * other.size
                    other.resize(len(other.slots))
            more = min(free // size, max(_FEWEST, pool.capacity))
            if not more:
                return None
            pool.resize(pool.capacity + more)
        slot = Slot(pool, len(pool.slots))
        pool.slots.append(slot)
        return slot

    def free(self, slot: Slot) -> None:
        """Overwrite the slot and give it back. The pool's last request moves into it."""
        pool = slot.pool
        last = pool.slots.pop()
        if last is not slot:
            pool.move(last, slot.index, overwritten=slot.length)
            pool.slots[slot.index] = last
        pool.erase(len(pool.slots), max(slot.length, last.length))

    def clear(self) -> None:
        """Overwrite and drop everything."""
        for pool in self._pools.values():
            pool.slots.clear()
            pool.resize(0)
        self._pools.clear()


class _SlotPool:
    def __init__(self, size: int) -> None:
        self.size = size
        self.capacity = 0
        self.slots: list[Slot] = []  # those in use, by index
        self._stores: dict[int, tuple[Tensor, Tensor]] = {}  # by block, made when first written to

    def stores(self, layer: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (slots, heads, size, D) of a block; `like`: its packed keys (N, heads, D)."""
        if layer not in self._stores:
            shape = (self.capacity, like.shape[1], self.size, like.shape[2])
            self._stores[layer] = like.new_zeros(shape), like.new_zeros(shape)
        return self._stores[layer]

    def resize(self, capacity: int) -> None:
        """Change the number of slots, but not below those in use."""
        if capacity != self.capacity:
            in_use = len(self.slots)
            for layer, old in self._stores.items():
                new = tuple(t.new_zeros(capacity, *t.shape[1:]) for t in old)
                for to, of in zip(new, old, strict=True):
                    to[:in_use] = of[:in_use]
                    of.zero_()
                self._stores[layer] = new[0], new[1]
            self.capacity = capacity
        if not capacity:
            self._stores.clear()

    def move(self, slot: Slot, index: int, *, overwritten: int) -> None:
        """Move `slot` to an index that held `overwritten` tokens."""
        length = max(slot.length, overwritten)  # its own slot holds zeros after its last token
        for store in self._stores.values():
            for tensor in store:
                tensor[index, :, :length] = tensor[slot.index, :, :length]
        slot.index = index

    def erase(self, index: int, length: int) -> None:
        for store in self._stores.values():
            for tensor in store:
                tensor[index, :, :length] = 0


class _Singles(NamedTuple):
    """The requests of one pool that have a single token in the pass."""

    pool: _SlotPool
    rows: slice  # of the packed batch, by slot
    slots: Copies  # (rows,)
    positions: Copies  # (rows,)
    view: int  # slots that attention reads, up to the last with a row
    keys: int  # tokens that it reads of each slot, up to the longest


class _PromptChunk(NamedTuple):
    """Rows of one request that attend by themselves: part of its prompt, or one token."""

    slot: Slot
    rows: slice
    start: int  # tokens that are in the cache already


class BatchMetadata:
    """One forward pass over a packed batch: the next `counts` tokens of each of `slots`.

    The batch holds the requests in the order `order`, which are indices of the arguments. `position_ids`
    (1, N) and `last` (requests), the row of each request's last token, are in this order too. Give the pass
    to the model as `kv_cache=`.
    """

    def __init__(
        self, slots: Sequence[Slot], counts: Sequence[int], device: torch.device, *, alone: bool = False
    ) -> None:
        """`alone`: attention reads no other slot for a request's single token."""
        self.order = sorted(
            range(len(slots)), key=lambda i: (counts[i] > 1, slots[i].pool.size, slots[i].index)
        )
        self._members = [(slots[i], counts[i]) for i in self.order]
        self._chunks: list[_PromptChunk] = []
        # By the number of singles or chunk, window and device: blocks with the same window share a mask.
        self._masks: dict[tuple[int, int | None, torch.device], Tensor] = {}
        positions: list[int] = []
        last, singles = [], dict[int, list[Slot]]()
        for slot, count in self._members:
            if count == 1 and not alone:
                singles.setdefault(slot.pool.size, []).append(slot)
            else:
                rows = slice(len(positions), len(positions) + count)
                self._chunks.append(_PromptChunk(slot, rows, slot.length))
            positions += range(slot.length, slot.length + count)
            last.append(len(positions) - 1)
        self._singles, row = [], 0
        for of_pool in singles.values():
            self._singles.append(
                _Singles(
                    of_pool[0].pool,
                    slice(row, row + len(of_pool)),
                    Copies(torch.tensor([slot.index for slot in of_pool], device=device)),
                    Copies(torch.tensor([slot.length for slot in of_pool], device=device)),
                    of_pool[-1].index + 1,
                    max(slot.length for slot in of_pool) + 1,
                )
            )
            row += len(of_pool)
        self.windows: dict[int, int | None] = {}  # the window that each block asked for
        self.position_ids = torch.tensor([positions], device=device)
        self.last = torch.tensor(last, device=device)

    def done(self) -> None:
        """The pass is over: its tokens are in the cache."""
        for slot, count in self._members:
            slot.length += count

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float | None,
        softcap: float | None,
        window: int | None,
    ) -> Tensor:
        """Attention of query (N, H, D) over key and value (N, K, D) and what came before: (N, H, D)."""
        self.windows[layer] = window
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
        groups = query.shape[1] // key.shape[1]
        for number, single in enumerate(self._singles):
            keys, values = single.pool.stores(layer, key)
            slots, positions = single.slots.on(key.device), single.positions.on(key.device)
            keys[slots, :, positions] = key[single.rows]
            values[slots, :, positions] = value[single.rows]
            keys, values = (t[: single.view, :, : single.keys] for t in (keys, values))
            is_full = len(slots) == single.view
            rows = query[single.rows]
            if not is_full:  # attention also computes unused rows for the other slots
                rows = rows.new_zeros(single.view, *rows.shape[1:]).index_copy_(0, slots, rows)
            found = attend(
                rows.reshape(single.view, -1, groups, rows.shape[2]),
                keys,
                values,
                self._single_mask(number, window, query),
                scale=scale,
                softcap=softcap,
            ).reshape(rows.shape)
            out[single.rows] = found if is_full else found[slots]
        for number, chunk in enumerate(self._chunks, len(self._singles)):
            keys, values = (
                t[chunk.slot.index, :, : chunk.start + chunk.rows.stop - chunk.rows.start]
                for t in chunk.slot.pool.stores(layer, key)
            )
            keys[:, chunk.start :] = key[chunk.rows].transpose(0, 1)
            values[:, chunk.start :] = value[chunk.rows].transpose(0, 1)
            out[chunk.rows] = self._attend_chunk(
                number, chunk, query[chunk.rows], keys, values, scale=scale, softcap=softcap, window=window
            )
        return out

    def _attend_chunk(
        self,
        number: int,
        chunk: _PromptChunk,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        *,
        scale: float | None,
        softcap: float | None,
        window: int | None,
    ) -> Tensor:
        """query (n, H, D) over keys and values (K, S, D) of the same request: (n, H, D)."""
        groups, count, total = query.shape[1] // keys.shape[0], len(query), keys.shape[1]
        if softcap is None and not chunk.start and (window is None or window >= total):
            found = F.scaled_dot_product_attention(
                query.transpose(0, 1).unsqueeze(0),
                keys.unsqueeze(0),
                values.unsqueeze(0),
                is_causal=True,
                scale=scale,
                enable_gqa=groups > 1,
            )
            return found[0].transpose(0, 1)
        mask = self._chunk_mask(number, chunk, window, query)
        # Heads that share keys become one long query, so that no key is repeated.
        rows = (
            query.reshape(count, -1, groups, query.shape[2])
            .permute(1, 2, 0, 3)
            .reshape(1, len(keys), groups * count, -1)
        )
        found = attend(
            rows, keys.unsqueeze(0), values.unsqueeze(0), mask.repeat(groups, 1), scale=scale, softcap=softcap
        )
        return found.view(len(keys), groups, count, -1).permute(2, 0, 1, 3).reshape(query.shape)

    def _single_mask(self, number: int, window: int | None, like: Tensor) -> Tensor:
        """(view, 1, 1, keys): 0 where the slot's row sees the key, −∞ elsewhere."""
        key = (number, window, like.device)
        if key not in self._masks:
            single, device = self._singles[number], like.device
            slots = single.slots.on(device)
            # A slot without a row sees its first key. The softmax over no key at all is not a number.
            positions = slots.new_zeros(single.view).index_copy_(0, slots, single.positions.on(device))
            keys = torch.arange(single.keys, device=device)
            hidden = _hidden(positions[:, None], keys, window)
            self._masks[key] = hiding(hidden[:, None, None], like.dtype)
        return self._masks[key]

    def _chunk_mask(self, number: int, chunk: _PromptChunk, window: int | None, like: Tensor) -> Tensor:
        """(n, S) of a chunk."""
        key = (number, window, like.device)
        if key not in self._masks:
            keys = torch.arange(chunk.start + chunk.rows.stop - chunk.rows.start, device=like.device)
            self._masks[key] = hiding(_hidden(keys[chunk.start :, None], keys, window), like.dtype)
        return self._masks[key]


def _hidden(positions: Tensor, keys: Tensor, window: int | None) -> Tensor:
    """Which keys (S,) are hidden from queries at positions (…, 1): those outside (p − window, p]."""
    hidden = keys > positions
    return hidden if window is None else hidden | (keys <= positions - window)


def _packed_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    _mask: None,
    *,
    kv_cache: BatchMetadata,
    scaling: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    query, key, value = (t[0].transpose(0, 1) for t in (query, key, value))
    out = kv_cache.attend(
        module.layer_idx, query, key, value, scale=scaling, softcap=softcap, window=sliding_window
    )
    return out.unsqueeze(0), None


def attend_over_cache(model: Any) -> None:
    """Make a model's attention read and write the cache. This changes it for good: pass a copy.

    The model must support the library's attention interface. Afterwards it takes packed ids (1, N) with
    `position_ids` and `kv_cache=BatchMetadata(…)`, and nothing else.
    """
    ALL_ATTENTION_FUNCTIONS.register(_ATTENTION, _packed_attention)
    model.set_attn_implementation(_ATTENTION)
