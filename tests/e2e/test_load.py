"""A small run of the load (scripts/soak/load.py), and that its checks can fail."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from perfit_shared.shifts import LayerShift, ShiftTensors
from soak.fuzzing.shared import TENSORS
from soak.load import Life, run
from soak.loading import devices
from soak.loading.devices import KINDS, Device, Tally, Wrong


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_no_answer_is_wrong_and_no_update_lost(tmp_path: Path) -> None:
    result = run(tmp_path, calls=2500, devices=16, seed=1)
    assert result["wrong"] == []
    assert result["calls_answered"] == 2500 and set(result["answered"]) == set(KINDS)
    assert [life["ended"] for life in result["lives"]] == ["SIGTERM", "SIGKILL", "stop"]
    assert result["updates"] > 8
    # The faults were felt, or nothing was shown.
    assert result["cuts"] + result["stalls"] > 2
    assert result["faults"].get("Unavailable", 0) + result["faults"].get("BrokenOff", 0) > 0


def test_memory_that_grows_is_told() -> None:
    flat = Life(samples=[(n, 100_000 + n % 7) for n in range(0, 5000, 50)])
    grown = Life(samples=[(n, 100_000 + 6 * n) for n in range(0, 5000, 50)])
    # What a cloud takes at first is no growth.
    warming = Life(samples=[(n, 80_000 if n < 900 else 100_000) for n in range(0, 5000, 50)])
    short = Life(samples=[(n, 100_000 + 100 * n) for n in range(0, 1500, 50)])
    assert flat.growth() == pytest.approx(0, abs=1e-3) and warming.growth() == pytest.approx(0, abs=1e-3)
    assert grown.growth() == pytest.approx(0.17, abs=0.02)
    assert short.growth() is None


def moved(by: float) -> ShiftTensors:
    """Tensors that differ in one entry, by this share of its tensor's largest."""
    layers = dict(TENSORS[1].layers)
    source = layers[1].source.copy()
    source[0, 0] += np.float32(by * np.abs(source).max())
    layers[1] = LayerShift(layers[1].rotation, source, layers[1].bias)
    return ShiftTensors(layers)


@pytest.fixture
def device() -> Device:
    made = Device.__new__(Device)
    made.number, made.tally = 0, Tally()
    made._references = {
        ("seed", 0): ShiftTensors(
            {
                layer: LayerShift(*(np.zeros_like(array) for array in shift))
                for layer, shift in TENSORS[1].layers.items()
            }
        )
    }
    return made


@pytest.mark.parametrize(
    ("kind", "found", "wanted"),
    [
        ("generate_base", "the cat", "the dog"),
        ("ask", ["a", "b", "c"], ["a", "c", "b"]),
        ("score", [-10.0, -20.0], [-10.0, -20.0 * (1 + 3 * devices.LOSS)]),
        ("gradient", (1.0 + 3 * devices.LOSS, 9, moved(0)), (1.0, 9, moved(0))),
        ("gradient", (1.0, 9, moved(2 * devices.GRADIENT)), (1.0, 9, moved(0))),
        ("gradient", (1.0, 9, moved(float("nan"))), (1.0, 9, moved(0))),
        ("update", (0.5, moved(2 * devices.UPDATE)), (0.5, moved(0))),
    ],
)
def test_an_answer_that_differs_is_wrong(device: Device, kind: str, found: Any, wanted: Any) -> None:
    device._compare(kind, wanted, wanted)
    with pytest.raises(Wrong):
        device._compare(kind, found, wanted)
