"""What training does not compute changes nothing: log-likelihoods and gradients of every family."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from perfit_cloud.collective.frozen import FrozenBase
from tests.support.models import FAMILIES, random_shift
from torch import Tensor

from perfit_cloud.collective import frozen
from perfit_cloud.engine.gradients.batch import Pair, group_all, make_batch, target_log_likelihoods
from perfit_cloud.model.base import BaseModel, block_list
from perfit_cloud.model.interventions import hooked
from perfit_shared.positions import Positions
from perfit_shared.shifts import ShiftSpec

POSITIONS = Positions.parse("f2+l2")
PAIRS: list[Pair] = [
    ([0, 20, 31, 44, 58, 63], [70, 71, 1]),
    ([0, 25], [90, 1]),
    ([0, 41, 42, 43, 44, 45, 46, 47, 48], [33, 1]),
    ([0, 77, 78, 79], [60, 61, 62, 63, 64, 1]),
]


def run(base: BaseModel, how: FrozenBase | None, pairs: list[Pair] = PAIRS) -> tuple[Tensor, list[Tensor]]:
    """(log-likelihoods under random shifts, gradient of their sum for both shifts)."""
    from perfit_cloud.collective.steps import trainable

    spec = ShiftSpec((1, 3), "f2+l2", 6, 3, base.hidden_size)
    collective, personal = (trainable(random_shift(spec, r, r), base.device) for r in (6, 3))
    batch = make_batch(pairs, POSITIONS, base.device)
    groups = group_all(batch, collective, personal)
    with hooked(base.model, spec.layers):
        if how is None:
            found = target_log_likelihoods(base, batch, groups)[batch.labels != -100]
        else:
            found = how.log_likelihoods(pairs, batch, groups)
        leaves = [t for shift in (collective, personal) for phi in shift.values() for t in phi]
        return found.detach(), list(torch.autograd.grad(found.sum(), leaves))


def same(ours: tuple[Tensor, list[Tensor]], theirs: tuple[Tensor, list[Tensor]]) -> None:
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-4, atol=1e-4)
    for mine, other in zip(ours[1], theirs[1], strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-5 * float(other.abs().max()))


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_work_changes_nothing(load: Callable[[str], BaseModel], family: str) -> None:
    base = load(family)
    plain = run(base, None)
    how = FrozenBase(base, 1)
    counted: list[int] = []
    assert how.keep(PAIRS, counted.append)
    assert sum(counted) == len(PAIRS)
    same(run(base, how), plain)
    assert how.try_rows(PAIRS)
    same(run(base, how), plain)
    same(run(base, how, PAIRS[2:]), run(base, None, PAIRS[2:]))  # in other company, with other padding
    strangers: list[Pair] = [([0, 9, 8, 7], [5, 1]), PAIRS[0]]
    same(run(base, how, strangers), run(base, None, strangers))


def test_it_is_saved_indeed(load: Callable[[str], BaseModel]) -> None:
    base = load("llama")
    how = FrozenBase(base, 1)
    how.keep(PAIRS, lambda _: None)
    how.try_rows(PAIRS)
    rows: dict[str, int] = {}
    blocks = block_list(base.model)
    watched = {f"mlp {i}": blocks[i].mlp for i in range(4)} | {"head": base.model.get_output_embeddings()}

    def watch(name: str) -> Any:
        def note(_module: Any, args: tuple[Tensor, ...], _output: Any) -> None:
            rows[name] = args[0].shape[:2].numel()

        return note

    handles = [module.register_forward_hook(watch(name)) for name, module in watched.items()]
    run(base, how)
    for handle in handles:
        handle.remove()
    targets = sum(len(target) for _, target in PAIRS)
    longest = max(len(prompt) + len(target) for prompt, target in PAIRS)
    assert rows == {"mlp 2": len(PAIRS) * longest, "mlp 3": targets, "head": targets}


def test_a_corpus_that_needs_too_much_memory_is_run_in_full(
    load: Callable[[str], BaseModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = load("llama")
    needed = sum(len(p) + len(t) for p, t in PAIRS) * base.hidden_size * 4
    monkeypatch.setattr(frozen, "_KEPT_BYTES", needed - 1)
    assert not FrozenBase(base, 1).keep(PAIRS, lambda _: None)
    monkeypatch.setattr(frozen, "_KEPT_BYTES", needed)
    assert FrozenBase(base, 1).keep(PAIRS, lambda _: None)


def test_a_model_for_which_it_does_not_hold_is_run_in_full(load: Callable[[str], BaseModel]) -> None:
    """An MLP that mixes positions, and a last block that reads what the first made."""
    base = load("llama")
    blocks = block_list(base.model)
    mixing = blocks[-1].mlp.register_forward_hook(lambda _m, _a, out: out + out.mean(1, keepdim=True))
    seen: list[Tensor] = []
    reading = blocks[0].self_attn.register_forward_hook(lambda _m, _a, out: seen.append(out[0]))
    adding = blocks[-1].register_forward_hook(
        lambda _m, _a, out: out + (seen.pop() if seen else torch.zeros_like(out))
    )
    try:
        how = FrozenBase(base, 1)
        assert not how.try_rows(PAIRS)
        assert not how.keep(PAIRS, lambda _: None)
        same(run(base, how), run(base, None))
    finally:
        for handle in (mixing, reading, adding):
            handle.remove()
