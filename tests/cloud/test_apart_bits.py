"""`apart=bits`: no bit of a gradient tells whether others were there (answers: engine_contract)."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from tests.support.gradients import make_pairs, person
from tests.support.models import build

from perfit_cloud.engine.device_lock import DeviceLock
from perfit_cloud.engine.gradients.batch import BatchBudget
from perfit_cloud.engine.gradients.example_cache import ON_DEVICE
from perfit_cloud.engine.gradients.scheduler import GradientScheduler
from perfit_cloud.engine.gradients.session import GradientRequest, UpdateEngine
from perfit_cloud.model.kv_cache import BatchMetadata, KVCache

FAMILIES = ["llama", "gpt2", "gemma3_text"]
MINE, NEIGHBOURS = "mine", 7


@torch.inference_mode()  # as engines answer
def attention_of(heads: int, keys: int, width: int, *, neighbours: int, alone: bool) -> torch.Tensor:
    """What attention gave for a prompt and twelve tokens, in a pool where others stood before."""
    kv_cache, cpu = KVCache(4096), torch.device("cpu")
    others = [kv_cache.allocate(100) for _ in range(neighbours)]
    place, found = kv_cache.allocate(100), []
    assert place is not None
    theirs, mine = (torch.Generator().manual_seed(seed) for seed in (1, 2))
    for where, count, generator in [
        *((other, 5, theirs) for other in others if other is not None),
        (place, 20, mine),
        *[(place, 1, mine)] * 12,
    ]:
        made = BatchMetadata([where], [count], cpu, alone=alone)
        q, k, v = (torch.randn(count, n, width, generator=generator) for n in (heads, keys, keys))
        found.append(made.attend(0, q, k, v, scale=None, softcap=None, window=None))
        made.done()
    return torch.cat(found[neighbours:])


def test_a_token_s_attention_does_not_tell_which_slot_it_has() -> None:
    """It did in the last bits, where several threads compute: the slots before it were asked as well."""
    threads, differs = torch.get_num_threads(), []
    torch.set_num_threads(2)
    try:
        for sizes in ((4, 2, 8), (8, 8, 64), (9, 3, 64)):
            wanted = attention_of(*sizes, neighbours=0, alone=True)
            for neighbours in (1, 3, NEIGHBOURS):
                assert torch.equal(attention_of(*sizes, neighbours=neighbours, alone=True), wanted)
                beside = attention_of(*sizes, neighbours=neighbours, alone=False)
                differs.append(not torch.equal(beside, attention_of(*sizes, neighbours=0, alone=False)))
    finally:
        torch.set_num_threads(threads)
    if not any(differs):
        pytest.skip("this processor computes a slot's row alike whatever stands beside it; nothing to tell")


def gradients_of(base: Any, artefact: Any, *, neighbours: int, alone: bool) -> list[np.ndarray[Any, Any]]:
    """Those of three steps, over examples that are kept and examples that are not."""
    device_lock, parts = DeviceLock(), NEIGHBOURS + 1 if alone else 0
    engine = UpdateEngine(base, keep_bytes=150_000, device_lock=device_lock, parts=parts)
    engine.budget = BatchBudget(150, 2**20, 2**20)
    queue = GradientScheduler(engine, alone=alone)
    others = [
        queue.open(make_pairs([40 + n, 9, 33, 21, 60], n), artefact, owner=f"neighbour {n}")
        for n in range(neighbours)
    ]
    mine = queue.open(make_pairs([30, 12, 44, 25, 18, 50], 100), artefact, owner=MINE)
    if alone and queue.caches_activations:
        assert 0 < mine.cache.count(ON_DEVICE) < 6
    found: list[np.ndarray[Any, Any]] = []
    for number in range(3):
        hold = threading.Event()
        holder = threading.Thread(target=_hold, args=(device_lock, hold))
        holder.start()
        futures = [
            queue.submit(GradientRequest(other, [0, 1, 2, 3, 4], person(artefact, n)))
            for n, other in enumerate(others)
        ]
        future = queue.submit(GradientRequest(mine, range(6), person(artefact, 200 + number)))
        hold.set()
        holder.join()
        gradient = future.result(60)
        for each in futures:
            each.result(60)
        found += [np.float64(gradient.loss), *(array for _, array in gradient.tensors.named())]
    queue.close()
    return found


def _hold(device_lock: DeviceLock, until: threading.Event) -> None:
    with device_lock.hold_long():
        assert until.wait(60)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_an_empty_cloud(family: str, make_artefact: Callable[..., Any]) -> None:
    base = build(family)
    artefact = make_artefact(base, positions="l4")
    wanted = gradients_of(base, artefact, neighbours=0, alone=True)
    got = gradients_of(base, artefact, neighbours=NEIGHBOURS, alone=True)
    assert len(wanted) == len(got)
    assert all(np.array_equal(a, b) for a, b in zip(wanted, got, strict=True))


def test_without_it_neighbours_show(make_artefact: Callable[..., Any]) -> None:
    """In the last bits; or the test above would show nothing."""
    base = build("llama")
    artefact = make_artefact(base, positions="l4")
    alone, beside = (gradients_of(base, artefact, neighbours=n, alone=False) for n in (0, NEIGHBOURS))
    pairs = list(zip(alone, beside, strict=True))
    assert not all(np.array_equal(a, b) for a, b in pairs)
    for a, b in pairs:
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)
