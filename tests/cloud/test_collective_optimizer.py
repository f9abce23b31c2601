"""Adam on the Stiefel manifold: rotations stay orthonormal, and it is no worse than torch's way."""

from __future__ import annotations

import numpy as np
import torch
from tests.support.models import random_shift
from torch import Tensor, nn

from perfit_cloud.collective.optimizer import StiefelAdam, retract, tangent
from perfit_cloud.collective.steps import from_torch, rate_at, trainable
from perfit_cloud.model.interventions import Phi, phi
from perfit_shared.optimizer import OptimizerConfig, StiefelAdamW
from perfit_shared.shifts import ShiftSpec

D, R, ROWS = 32, 4, 256


def rotation(seed: int) -> Tensor:
    return retract(torch.randn(1, R, D, generator=torch.Generator().manual_seed(seed)))


def problem() -> tuple[Tensor, Tensor]:
    """Rows x (1, N, d) and what an unknown φ of the same rank makes of them, with some noise."""
    torch.manual_seed(0)
    truth = Phi(rotation(1), torch.randn(1, R, D) / D**0.5, torch.randn(1, R))
    x = torch.randn(1, ROWS, D)
    return x, phi(x, truth) + 0.3 * torch.randn_like(x)


def leaves() -> Phi:
    start = rotation(2)
    return Phi(*(t.clone().requires_grad_() for t in (start, start, torch.zeros(1, R))))


def loss_of(x: Tensor, y: Tensor, shift: Phi) -> Tensor:
    return (phi(x, shift) - y).square().mean() * 32


def test_rotations_stay_orthonormal_over_a_thousand_steps() -> None:
    x, y = problem()
    shift = leaves()
    optimizer = StiefelAdam([{0: shift}])
    start = shift.rotation.detach().clone()
    worst = 0.0
    for _ in range(1000):
        loss_of(x, y, shift).backward()  # type: ignore[no-untyped-call]
        optimizer.step(5e-3)
        r = shift.rotation.detach().double()[0]
        worst = max(worst, float(torch.linalg.norm(r @ r.T - torch.eye(R, dtype=torch.float64))))
    assert worst <= 1e-6
    assert not torch.allclose(start, shift.rotation, atol=0.1)  # and it did move


def test_it_ends_at_most_2_percent_above_torch_s_orthogonal_parametrization() -> None:
    """Same data, start, schedule and clipping; AdamW without weight decay there."""
    x, y = problem()
    steps, peak = 600, 1e-2
    ours = leaves()
    optimizer = StiefelAdam([{0: ours}])
    for i in range(steps):
        loss_of(x, y, ours).backward()  # type: ignore[no-untyped-call]
        optimizer.step(rate_at(i, steps, peak))

    start = leaves()
    holder = nn.Linear(D, R, bias=False)  # weight (r, d) with orthonormal rows
    holder.weight.data.copy_(start.rotation.detach()[0])
    holder = nn.utils.parametrizations.orthogonal(holder)
    holder.weight = start.rotation.detach()[0]
    torch.testing.assert_close(holder.weight, start.rotation.detach()[0], atol=1e-5, rtol=0)
    parameters = [*holder.parameters(), start.source, start.bias]
    adam = torch.optim.AdamW(parameters, weight_decay=0.0)
    for i in range(steps):
        adam.zero_grad()
        theirs = Phi(holder.weight.unsqueeze(0), start.source, start.bias)
        loss_of(x, y, theirs).backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, 0.3)
        adam.param_groups[0]["lr"] = rate_at(i, steps, peak)
        adam.step()
    with torch.no_grad():
        final = loss_of(x, y, Phi(holder.weight.unsqueeze(0), start.source, start.bias))
        initial = loss_of(x, y, leaves())
        reached = loss_of(x, y, ours)
    assert float(final) < 0.5 * float(initial)  # the yardstick itself learned something
    assert float(reached) <= 1.02 * float(final)


def test_tangent_directions_are_tangent_and_retraction_keeps_a_point() -> None:
    r = rotation(3)
    direction = tangent(torch.randn(1, R, D), r)
    inner = direction @ r.mT
    torch.testing.assert_close(inner, -inner.mT, atol=1e-6, rtol=0)
    torch.testing.assert_close(retract(r), r, atol=1e-6, rtol=0)


def test_state_goes_on_bit_for_bit() -> None:
    x, y = problem()

    def run(parts: list[int]) -> Phi:
        shift = leaves()
        optimizer = StiefelAdam([{0: shift}])
        for count in parts:
            fresh = StiefelAdam([{0: shift}])
            fresh.load(optimizer.state())
            optimizer = fresh
            for _ in range(count):
                loss_of(x, y, shift).backward()  # type: ignore[no-untyped-call]
                optimizer.step(1e-2)
        return shift

    assert all(torch.equal(a, b) for a, b in zip(run([7]), run([3, 4]), strict=True))


def test_a_tensor_without_a_gradient_stays_at_first() -> None:
    shift = leaves()
    before = [t.detach().clone() for t in shift]
    assert StiefelAdam([{0: shift}]).step(0.1) == 0.0
    for old, new in zip(before, shift, strict=True):
        torch.testing.assert_close(old, new.detach(), atol=1e-6, rtol=0)


def test_a_step_is_the_device_s_step() -> None:
    """Both shifts' gradients are clipped together; each moves as numpy's optimizer moves it."""
    spec = ShiftSpec((0, 2), "l1", R, R, D)
    start = random_shift(spec, R, seed=3)
    theirs, numpy_s = StiefelAdamW(OptimizerConfig(2e-2, 40, schedule="paper")), start
    ours = trainable(start, torch.device("cpu"))
    optimizer = StiefelAdam([ours])
    for index in range(40):
        gradient = random_shift(spec, R, seed=10 + index)
        for layer, of in gradient.layers.items():
            for tensor, array in zip(ours[layer], of, strict=True):
                tensor.grad = torch.from_numpy(array).unsqueeze(0).clone()
        optimizer.step(rate_at(index, 40, 2e-2))
        numpy_s = theirs.step(numpy_s, gradient)
    for layer, of in from_torch(ours).layers.items():
        for mine, other, first in zip(of, numpy_s.layers[layer], start.layers[layer], strict=True):
            np.testing.assert_allclose(mine, other, rtol=0, atol=2e-5)
            assert np.abs(mine - first).max() > 1e-2
