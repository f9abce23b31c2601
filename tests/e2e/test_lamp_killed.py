"""A LaMP run that is killed and started again ends with the figures of one that nobody disturbed."""

from __future__ import annotations

import json
import os
import random
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.support.lamp_files import TASK, write_files

from local import BIN


def summary(out: Path) -> dict[str, Any]:
    """Without its clock."""
    found: dict[str, Any] = json.loads((out / "summary.json").read_text())
    del found["seconds"]
    return found


@pytest.mark.slow
def test_killed_at_three_random_moments(model_folder: Callable[[str], Path], tmp_path: Path) -> None:
    data = write_files(tmp_path / "data")

    def command(out: Path) -> list[str]:
        return [
            str(BIN / "perfit-cloud"),
            "lamp",
            "run",
            "--task",
            TASK,
            "--model",
            str(model_folder("llama")),
            "--data",
            str(data),
            "--out",
            str(out),
            "--layers",
            "1;2",
            "--positions",
            "f2+l3",
            "--collective-rank",
            "4",
            "--personal-rank",
            "2",
            "--batch-size",
            "2",
            "--collective-epochs",
            "6",
            "--collective-lr",
            "5e-3",
            "--epochs",
            "30",
            "--lr",
            "1e-2",
            "--users-together",
            "2",
            "--threads",
            "1",
        ]

    env = os.environ | {"OMP_NUM_THREADS": "1"}
    began = time.monotonic()
    subprocess.run(command(tmp_path / "straight"), check=True, env=env, capture_output=True)
    whole = time.monotonic() - began
    seed = random.randrange(2**32)
    draw = random.Random(seed)
    moments = [draw.uniform(0.3, 0.7) * whole for _ in range(3)]
    print(f"seed {seed}: killed after {', '.join(f'{m:.1f}' for m in moments)} of {whole:.1f} s")
    out, killed = tmp_path / "killed", 0
    for moment in moments:
        with subprocess.Popen(
            command(out), env=env, stderr=subprocess.PIPE, stdout=subprocess.PIPE
        ) as process:
            try:
                process.wait(moment)
            except subprocess.TimeoutExpired:
                process.kill()
                killed += 1
    assert killed >= 1, "it was over before the first moment"
    subprocess.run(command(out), check=True, env=env, capture_output=True)
    assert summary(out) == summary(tmp_path / "straight")
