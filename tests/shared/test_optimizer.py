"""The Stiefel optimizer stays on the manifold and keeps up with torch's orthogonal parametrization."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch.nn.utils import parametrizations

from perfit_shared.errors import InvalidData, InvalidInput
from perfit_shared.optimizer import OptimizerConfig, StiefelAdamW, learning_rate_at
from perfit_shared.shifts import LayerShift, ShiftSpec, ShiftTensors

D = 32
NOISE = 0.2  # of the targets: a floor under the loss, as language has one


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny matrices on many threads spend their time waiting for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def shift_for(rank: int, seed: int, *, layers: tuple[int, ...] = (0,), d: int = D) -> ShiftTensors:
    spec = ShiftSpec(layers=layers, positions="l7", collective_rank=rank, personal_rank=rank, hidden_size=d)
    return ShiftTensors.identity(spec, rank, seed)


def phi(x: torch.Tensor, R: torch.Tensor, W: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return x + (x @ W.T + b - x @ R.T) @ R


class Problem:
    """Fit a frozen random network of φ(x) to targets made by a hidden φ*."""

    def __init__(self, seed: int, rank: int) -> None:
        g = torch.Generator().manual_seed(seed)
        self.x = torch.randn(256, D, generator=g)
        self.hidden = torch.randn(D, 64, generator=g) / math.sqrt(D)
        self.out = torch.randn(64, 8, generator=g) / 8
        q = torch.linalg.qr(torch.randn(D, rank, generator=g))[0].T.contiguous()
        target = phi(self.x, q, torch.randn(rank, D, generator=g) * 0.5, torch.randn(rank, generator=g))
        self.y = self.read(target) + NOISE * torch.randn(256, 8, generator=g)
        self.order = [torch.randperm(256, generator=g)[:32] for _ in range(400)]

    def read(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x @ self.hidden) @ self.out

    def loss(self, R: torch.Tensor, W: torch.Tensor, b: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return ((self.read(phi(self.x[rows], R, W, b)) - self.y[rows]) ** 2).mean()

    def full(self, R: torch.Tensor, W: torch.Tensor, b: torch.Tensor) -> float:
        return float(self.loss(R, W, b, torch.arange(256)))


def train_ours(problem: Problem, start: ShiftTensors, config: OptimizerConfig) -> float:
    optimizer, tensors = StiefelAdamW(config), start
    for step in range(config.total_steps):
        parts = [torch.tensor(a, requires_grad=True) for a in tensors.layers[0]]
        problem.loss(*parts, problem.order[step]).backward()
        tensors = optimizer.step(tensors, ShiftTensors({0: LayerShift(*(p.grad.numpy() for p in parts))}))
    return problem.full(*(torch.tensor(a) for a in tensors.layers[0]))


def train_torch(problem: Problem, start: ShiftTensors, config: OptimizerConfig) -> float:
    shift = start.layers[0]
    rotation = torch.nn.Linear(D, shift.bias.size, bias=False)
    parametrizations.orthogonal(rotation)
    rotation.weight = torch.tensor(shift.rotation)
    W, b = torch.nn.Parameter(torch.tensor(shift.source)), torch.nn.Parameter(torch.tensor(shift.bias))
    parameters = [*rotation.parameters(), W, b]
    adam = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=0.0)
    for step in range(config.total_steps):
        for group in adam.param_groups:
            group["lr"] = learning_rate_at(step, config)
        adam.zero_grad()
        problem.loss(rotation.weight, W, b, problem.order[step]).backward()
        torch.nn.utils.clip_grad_norm_(parameters, config.clip)
        adam.step()
    with torch.no_grad():
        return problem.full(rotation.weight, W, b)


@pytest.mark.slow
@pytest.mark.parametrize("rate", [2e-3, 5e-3, 1e-2, 2e-2])
def test_ends_no_worse_than_torchs_orthogonal_parametrization(rate: float) -> None:
    ratios = []
    for seed, rank in [(0, 4), (1, 4), (2, 8), (3, 16)]:
        torch.manual_seed(seed)
        problem, start = Problem(seed, rank), shift_for(rank, seed)
        config = OptimizerConfig(learning_rate=rate, total_steps=200, schedule="paper")
        ours, theirs = train_ours(problem, start, config), train_torch(problem, start, config)
        before = problem.full(*(torch.tensor(a) for a in start.layers[0]))
        assert theirs < 0.9 * before, "the reference learned nothing, so it proves nothing"
        ratios.append(ours / theirs)
    assert max(ratios) <= 1.02, ratios
    assert sum(ratios) / len(ratios) <= 1.0, ratios


def test_rows_stay_orthonormal_over_a_thousand_steps() -> None:
    rng = np.random.default_rng(0)
    tensors = shift_for(32, 0, layers=(1,), d=128)
    optimizer = StiefelAdamW(OptimizerConfig(learning_rate=1e-2, total_steps=1000))
    worst = 0.0
    for _ in range(1000):
        noise = {n: rng.standard_normal(a.shape).astype(np.float32) for n, a in tensors.named()}
        tensors = optimizer.step(tensors, ShiftTensors.from_named(noise))
        for shift in tensors.layers.values():
            r = shift.rotation.astype(np.float64)
            worst = max(worst, float(np.linalg.norm(r @ r.T - np.eye(32))))
    assert worst <= 1e-6
    assert all(a.dtype == np.float32 for _, a in tensors.named())


def test_state_survives_bytes_exactly() -> None:
    rng = np.random.default_rng(1)
    start = tensors = shift_for(4, 3)
    gradients = [
        ShiftTensors.from_named(
            {n: rng.standard_normal(a.shape).astype(np.float32) for n, a in start.named()}
        )
        for _ in range(6)
    ]
    straight = StiefelAdamW(OptimizerConfig(learning_rate=1e-2, total_steps=6))
    for gradient in gradients:
        tensors = straight.step(tensors, gradient)
    resumed = StiefelAdamW(OptimizerConfig(learning_rate=1e-2, total_steps=6))
    again = start
    for gradient in gradients:
        again = resumed.step(again, gradient)
        resumed = StiefelAdamW.from_bytes(resumed.to_bytes())
    assert again.digest() == tensors.digest()


def test_a_device_s_rate_grows_tenfold_then_decays() -> None:
    config = OptimizerConfig(learning_rate=1.0, total_steps=100)
    rates = [learning_rate_at(step, config) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[50] == max(rates) == 1.0
    np.testing.assert_allclose(np.divide(rates[1:51], rates[:50]), 10 ** (1 / 50))
    np.testing.assert_allclose(rates[50:], np.arange(50, 0, -1) / 50)
    assert learning_rate_at(0, OptimizerConfig(learning_rate=1.0, total_steps=1)) == pytest.approx(0.1)


def test_nonsense_is_refused() -> None:
    for rate in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(InvalidInput):
            OptimizerConfig(learning_rate=rate, total_steps=1)
    with pytest.raises(InvalidData):
        StiefelAdamW.from_bytes(b"\x10" * 40)
