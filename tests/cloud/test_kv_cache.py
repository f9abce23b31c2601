"""The cache of keys and values: room, moves, and that nothing stays on them."""

from __future__ import annotations

import numpy as np
import torch

from perfit_cloud.model.kv_cache import BatchMetadata, KVCache, Slot

HEADS, WIDTH, LAYERS = 2, 4, 3


def write(slots: list[Slot], counts: list[int], seed: int) -> tuple[BatchMetadata, dict[int, torch.Tensor]]:
    """A pass with random queries, keys and values; what its attention gave, by layer, in its order."""
    made = BatchMetadata(slots, counts, torch.device("cpu"))
    generator, out = torch.Generator().manual_seed(seed), {}
    for layer in range(LAYERS):
        q, k, v = torch.randn(3, sum(counts), HEADS, WIDTH, generator=generator)
        out[layer] = made.attend(layer, q, k, v, scale=None, softcap=None, window=None)
    made.done()
    return made, out


def held(slots: list[Slot]) -> list[torch.Tensor]:
    """Keys and values of the pools of these slots."""
    like = torch.empty(1, HEADS, WIDTH)
    pools = {id(slot.pool): slot.pool for slot in slots}.values()
    return [t for pool in pools for layer in range(LAYERS) for t in pool.stores(layer, like)]


def test_room_is_bounded_and_comes_back() -> None:
    kv_cache = KVCache(1024)
    slots = []
    while (slot := kv_cache.allocate(100)) is not None:
        slots.append(slot)
    assert len(slots) == 1024 // 128
    assert kv_cache.allocate(20) is None
    for slot in slots:
        kv_cache.free(slot)
    assert kv_cache.allocate(512) is not None  # the empty pool of 128s gives its room up
    assert kv_cache.allocate(512) is not None
    assert kv_cache.allocate(20) is None


def test_freed_slots_hold_zeros_and_the_last_moves_in() -> None:
    kv_cache = KVCache(4096)
    slots = [p for n in (40, 50, 60, 30) if (p := kv_cache.allocate(n)) is not None]
    write(slots, [20, 30, 40, 10], 0)
    first, last = slots[0], slots[2]
    stores = held([first, last])
    before = [t[last.index].clone() for t in stores]
    kv_cache.free(first)
    assert last.index == 0
    for tensor, was in zip(stores, before, strict=True):
        assert torch.equal(tensor[0], was)
    everything = held(slots)
    assert all(tensor.any() for tensor in everything)
    for slot in (slots[1], last, slots[3]):
        kv_cache.free(slot)
    assert all(not tensor.any() for tensor in everything)


def test_dropped_stores_are_overwritten() -> None:
    kv_cache = KVCache(4096)
    slots = [p for n in (40, 50) if (p := kv_cache.allocate(n)) is not None]
    write(slots, [20, 30], 0)
    kept = held(slots)
    kv_cache.clear()
    assert all(not tensor.any() for tensor in kept)
    assert kv_cache.allocate(2000) is not None


def test_growing_keeps_what_lies_there_and_overwrites_the_old() -> None:
    kv_cache = KVCache(4096)
    slots = [p for _ in range(4) if (p := kv_cache.allocate(64)) is not None]
    write(slots, [5, 6, 7, 8], 1)
    old = held(slots)
    copies = [t.clone() for t in old]
    slots += [p for _ in range(3) if (p := kv_cache.allocate(64)) is not None]
    for new, was, before in zip(held(slots), copies, old, strict=True):
        assert torch.equal(new[:4], was)
        assert not before.any()


def test_chunks_moves_and_neighbours_do_not_change_what_attention_gives() -> None:
    """Random comings and goings against attention over each request's own history, computed apart."""
    rng = np.random.default_rng(0)
    kv_cache = KVCache(2048)
    generator = torch.Generator().manual_seed(3)
    running: dict[Slot, list[torch.Tensor]] = {}  # keys and values so far
    for _ in range(60):
        while len(running) < 7 and (slot := kv_cache.allocate(int(rng.integers(20, 90)))) is not None:
            running[slot] = [torch.empty(0, HEADS, WIDTH), torch.empty(0, HEADS, WIDTH)]
        slots = list(running)
        counts = [int(rng.choice([1, 1, 1, 3, 6])) for _ in slots]
        made = BatchMetadata(slots, counts, torch.device("cpu"))
        q, k, v = torch.randn(3, sum(counts), HEADS, WIDTH, generator=generator)
        window = int(rng.choice([4, 1000]))
        got = made.attend(0, q, k, v, scale=0.7, softcap=None, window=window)
        row = 0
        for number in made.order:
            slot, count = slots[number], counts[number]
            part = slice(row, row + count)
            keys, values = running[slot] = [
                torch.cat([old, new[part]]) for old, new in zip(running[slot], (k, v), strict=True)
            ]
            assert made.position_ids[0, part].tolist() == list(range(len(keys) - count, len(keys)))
            assert made.last[made.order.index(number)] == row + count - 1
            for i in range(count):
                at = len(keys) - count + i
                seen = slice(max(0, at - window + 1), at + 1)
                scores = torch.einsum("hd,shd->hs", q[row + i], keys[seen]) * 0.7
                want = torch.einsum("hs,shd->hd", scores.softmax(-1), values[seen])
                torch.testing.assert_close(got[row + i], want)
            row += count
        made.done()
        for slot in [p for p in slots if p.length > 12 and rng.random() < 0.5]:
            kv_cache.free(slot)
            del running[slot]
