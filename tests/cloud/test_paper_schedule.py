"""The paper's schedule is that of Hugging Face's trainer: its warm-up, and batches of like length."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from transformers import get_linear_schedule_with_warmup
from transformers.trainer_pt_utils import LengthGroupedSampler

from perfit_cloud.collective.steps import rate_at
from perfit_shared.errors import InvalidInput
from perfit_shared.optimizer import OptimizerConfig, StiefelAdamW, learning_rate_at
from perfit_shared.shifts import ShiftSpec, ShiftTensors
from perfit_shared.training import PaperSchedule, Schedule, Training


def theirs(total: int) -> list[float]:
    """The rates of Hugging Face's linear schedule, whose warm-up is a tenth of the steps, rounded up."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=3.0)
    schedule = get_linear_schedule_with_warmup(optimizer, int(np.ceil(0.1 * total)), total)
    rates = []
    for _ in range(total):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return rates


@pytest.mark.parametrize("total", [2, 9, 11, 15, 70, 104])
def test_rates_are_hugging_face_s(total: int) -> None:
    """15 steps have a warm-up of 2 (rounded, stage 1's was that of 24 steps too)."""
    config = OptimizerConfig(learning_rate=3.0, total_steps=total, schedule="paper")
    ours = [learning_rate_at(step, config) for step in range(total)]
    np.testing.assert_allclose(ours, theirs(total), rtol=1e-12)
    assert ours[0] == 0
    np.testing.assert_allclose([rate_at(step, total, 3.0) for step in range(total)], ours, rtol=1e-12)


def test_a_single_step_learns() -> None:
    """Hugging Face's has rate 0: 13 examples in one batch trained nothing, and nobody was told."""
    assert learning_rate_at(0, OptimizerConfig(3.0, 1, schedule="paper")) == 3.0


def test_a_schedule_that_is_none() -> None:
    with pytest.raises(InvalidInput, match='no schedule "mine"; there are device, paper'):
        OptimizerConfig(learning_rate=1.0, total_steps=1, schedule="mine")


def schedule(lengths: list[int], *, batch_size: int = 4, seed: int = 0) -> PaperSchedule:
    return PaperSchedule(
        epochs=2,
        learning_rate=1e-2,
        batch_size=batch_size,
        seed=seed,
        examples=len(lengths),
        lengths=tuple(lengths),
    )


@pytest.mark.parametrize(("examples", "batch_size"), [(7, 4), (50, 4), (333, 4), (1000, 2)])
def test_batches_are_of_like_length(examples: int, batch_size: int) -> None:
    lengths = np.random.default_rng(0).integers(5, 200, examples).tolist()
    grouped = schedule(lengths, batch_size=batch_size)
    epoch = [grouped.batch(step) for step in range(grouped.steps_per_epoch)]
    rows = [row for batch in epoch for row in batch]
    assert sorted(rows) == list(range(examples))
    assert lengths[rows[0]] == max(lengths), "so that memory runs out at once or never"
    sampler = LengthGroupedSampler(batch_size, lengths=lengths, generator=torch.Generator().manual_seed(0))
    assert abs(pools(lengths, rows) - pools(lengths, list(sampler))) <= 2  # the longest moved out of one
    assert epoch != [grouped.batch(grouped.steps_per_epoch + step) for step in range(len(epoch))]
    assert epoch == [schedule(lengths, batch_size=batch_size).batch(step) for step in range(len(epoch))]


def pools(lengths: list[int], rows: list[int]) -> int:
    """Runs of rows each no longer than the one before."""
    return 1 + sum(lengths[a] < lengths[b] for a, b in pairwise(rows))


def distance(one: ShiftTensors, two: ShiftTensors) -> float:
    pairs = zip(one.named(), two.named(), strict=True)
    return max(float(np.abs(a - b).max()) for (_, a), (_, b) in pairs)


def test_a_run_resumes_with_its_schedule() -> None:
    spec = ShiftSpec((0,), "l2", 1, 2, 8)
    start = ShiftTensors.identity(spec, 2, 0)
    training = Training.start(schedule([9, 3, 5, 7, 1]), start)
    gradient = ShiftTensors.identity(spec, 2, 1)
    first = training.stepped(1.0, gradient)
    assert distance(first.tensors, start) < 1e-6, "the first step has rate 0"
    again = Training.from_bytes(first.to_bytes(), PaperSchedule)
    assert again.schedule == training.schedule and again.rows == first.rows
    assert again.stepped(1.0, gradient).tensors.digest() == first.stepped(1.0, gradient).tensors.digest()
    assert distance(again.stepped(1.0, gradient).tensors, start) > 1e-3
    with pytest.raises(InvalidInput, match="1 lengths of 5 examples"):
        PaperSchedule(1, 1e-2, 4, 0, 5, lengths=(3,))


def test_a_device_s_state_reads_as_before() -> None:
    """Versions before there were two schedules know no such key."""
    device = Schedule(1, 1e-2, 4, 0, 5).optimizer()
    assert b"schedule" not in StiefelAdamW(device).to_bytes()
    paper = schedule([1] * 5).optimizer()
    assert StiefelAdamW.from_bytes(StiefelAdamW(paper).to_bytes()).config == paper
