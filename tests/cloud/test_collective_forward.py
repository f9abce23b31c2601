"""Losses of stage 1 and their gradients for both shifts equal plain autograd, whatever is cached."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.support.models import FAMILIES, KEPT, build, random_shift
from torch import Tensor

from perfit_cloud.collective.forward import Forward, FullForward, PartialForward, forward_for
from perfit_cloud.collective.steps import trainable
from perfit_cloud.engine.gradients.batch import Pair
from perfit_cloud.model.base import BaseModel
from perfit_cloud.model.blocks import block_list
from perfit_cloud.model.interventions import Phi
from perfit_cloud.model.partial import PartialDecoder
from perfit_shared.positions import Positions
from perfit_shared.shifts import ShiftSpec

PAIRS: list[Pair] = [
    ([0, 20, 31, 44, 58, 63], [70, 71, 1]),
    ([0, 25], [90, 1]),
    ([0, *range(41, 73)], [33, 1]),
    ([0, 77, 78, 79], [60, 61, 62, 63, 64, 1]),
    ([0], [5, 1]),  # has no intervened token
]
STRANGERS: list[Pair] = [([0, 9, 8, 7], [5, 1]), PAIRS[0]]
TOKENS = sum(len(target) for _, target in PAIRS)
PLENTY = 2**30
SPECS = [((1, 2), "f2+l2"), ((0, 3), "l3"), ((3,), "l2"), ((1, 2), "s1+f2+l2")]

Shifts = list[dict[int, Phi]]
Found = tuple[float, list[Tensor]]  # loss, gradient of every tensor


def shifts_of(spec: ShiftSpec) -> Shifts:
    """φ₁ and φ₂, random."""
    return [
        trainable(random_shift(spec, rank, seed), torch.device("cpu")) for seed, rank in enumerate((6, 3))
    ]


def leaves(shifts: Shifts) -> list[Tensor]:
    return [tensor for shift in shifts for phi in shift.values() for tensor in phi]


def by_autograd(base: BaseModel, spec: ShiftSpec, pairs: list[Pair]) -> Found:
    """The formula in hooks on the library's model, an example at a time, whole and unpadded."""
    shifts = shifts_of(spec)
    total = torch.zeros(())
    for prompt, target in pairs:
        marks = Positions.parse(spec.positions).indices(len(prompt))

        def hook(layer: int, marks: Any = marks) -> Any:
            def shift(_module: Any, _args: Any, output: Any) -> Any:
                rows = list((output[0] if isinstance(output, tuple) else output).unbind(1))
                for mark in marks:
                    for of in shifts:
                        rotation, source, bias = (tensor[0] for tensor in of[layer])
                        x = rows[mark]
                        rows[mark] = x + (x @ source.T + bias - x @ rotation.T) @ rotation
                hidden = torch.stack(rows, 1)
                return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

            return shift

        blocks = block_list(base.model)
        handles = [blocks[layer].register_forward_hook(hook(layer)) for layer in spec.layers]
        logits = base.model(torch.tensor([[*prompt, *target]])).logits[0, len(prompt) - 1 : -1]
        total = total + torch.nn.functional.cross_entropy(logits, torch.tensor(target), reduction="sum")
        for handle in handles:
            handle.remove()
    return float(total.detach()), list(torch.autograd.grad(total, leaves(shifts)))


def found_by(forward: Forward, spec: ShiftSpec, pairs: list[Pair]) -> Found:
    shifts = shifts_of(spec)
    loss = forward.loss(pairs, *shifts, 1.0)
    gradients = [torch.zeros_like(t) if t.grad is None else t.grad for t in leaves(shifts)]
    assert forward.loss(pairs, *shifts, None) == pytest.approx(loss, rel=1e-5)
    return loss, gradients


def assert_same(ours: Found, theirs: Found) -> None:
    assert ours[0] == pytest.approx(theirs[0], rel=1e-5)
    for mine, other in zip(ours[1], theirs[1], strict=True):
        assert float((mine - other).norm()) <= 5e-5 * float(other.norm()) + 1e-6


@pytest.mark.parametrize(("layers", "positions"), SPECS)
@pytest.mark.parametrize("family", FAMILIES)
def test_losses_and_gradients_equal_autograd(family: str, layers: Any, positions: str) -> None:
    base = build(family)
    spec = ShiftSpec(layers, positions, 6, 3, base.hidden_size)
    wanted = by_autograd(base, spec, PAIRS)
    forward = forward_for(base, spec)
    assert isinstance(forward, PartialForward if family in KEPT else FullForward)
    assert_same(found_by(forward, spec, PAIRS), wanted)  # nothing is cached
    counted: list[int] = []
    forward.cache(PAIRS, counted.append)
    assert sum(counted) == (len(PAIRS) if family in KEPT else 0)
    assert_same(found_by(forward, spec, PAIRS), wanted)
    assert_same(found_by(forward, spec, PAIRS[2:]), by_autograd(base, spec, PAIRS[2:]))
    assert_same(found_by(forward, spec, STRANGERS), by_autograd(base, spec, STRANGERS))


@pytest.mark.parametrize("family", ["llama", "gemma2", "opt"])
def test_without_a_shift_it_is_the_base_model_and_without_a_seed_the_collective(family: str) -> None:
    base = build(family)
    spec = ShiftSpec((1, 2), "l3", 6, 3, base.hidden_size)
    forward = forward_for(base, spec)
    forward.cache(PAIRS, lambda _: None)
    plain = 0.0
    for prompt, target in PAIRS:
        logits = base.model(torch.tensor([[*prompt, *target]])).logits[0, len(prompt) - 1 : -1]
        plain += float(torch.nn.functional.cross_entropy(logits, torch.tensor(target), reduction="sum"))
    assert forward.loss(PAIRS, None, None, None) == pytest.approx(plain, rel=1e-5)
    collective, personal = shifts_of(spec)
    identity = {layer: Phi(phi.rotation, phi.rotation, 0 * phi.bias) for layer, phi in personal.items()}
    alone = forward.loss(PAIRS, collective, None, None)
    assert alone == pytest.approx(forward.loss(PAIRS, collective, identity, None), rel=1e-5)
    assert alone != pytest.approx(plain, rel=1e-3)


@pytest.fixture
def embedded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of every run of the lower blocks."""
    counts: list[int] = []
    embed = PartialDecoder.embed

    def counted(self: PartialDecoder, ids: Tensor) -> Tensor:
        counts.append(len(ids))
        return embed(self, ids)

    monkeypatch.setattr(PartialDecoder, "embed", counted)
    return counts


@pytest.mark.parametrize("positions", ["f2+l2", "l3"])
def test_cached_examples_skip_the_lower_blocks_and_the_head_sees_targets_alone(
    positions: str, embedded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = build("llama")
    spec = ShiftSpec((1,), positions, 6, 3, base.hidden_size)
    forward = forward_for(base, spec)
    forward.cache([*PAIRS, *PAIRS], lambda _: None)
    assert sum(embedded) == sum(len(prompt) + len(target) - 1 for prompt, target in PAIRS)  # once each
    embedded.clear()
    heads: list[int] = []
    losses = PartialDecoder.losses
    monkeypatch.setattr(
        PartialDecoder, "losses", lambda self, h, *more: heads.append(len(h)) or losses(self, h, *more)
    )
    forward.loss(PAIRS, *shifts_of(spec), 1.0)
    assert not embedded
    assert sum(heads) == TOKENS


@pytest.mark.parametrize("positions", ["f2+l2", "l3"])
def test_what_exceeds_the_budgets_is_spilled_and_then_computed_anew(
    positions: str, embedded: list[int]
) -> None:
    base = build("qwen3")
    spec = ShiftSpec((1, 2), positions, 6, 3, base.hidden_size)
    wanted = by_autograd(base, spec, PAIRS)
    missed = []
    for room, spill in ((PLENTY, 0), (6000, 0), (6000, PLENTY), (0, PLENTY), (0, 0)):
        forward = PartialForward(base, spec, cache_bytes=room, spill_bytes=spill)
        forward.cache(PAIRS, lambda _: None)
        embedded.clear()
        forward.loss(PAIRS, *shifts_of(spec), 1.0)
        missed.append(sum(embedded))
        assert_same(found_by(forward, spec, PAIRS), wanted)
    everything = sum(len(prompt) + len(target) - 1 for prompt, target in PAIRS)
    assert missed[0] == missed[2] == missed[3] == 0 < missed[1] < missed[4] == everything
