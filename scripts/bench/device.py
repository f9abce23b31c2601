"""How light the device is: one optimizer step, the memory of an update, the time of `perfit --help`.

    python scripts/bench/device.py --json docs/results/bench/device.json

At Llama-2-7B's width with the preset of LaMP-2N: 3 layers, rank 32, d = 4096, 786k numbers. The step
runs on one core, with the allocator set as in an update. The update is `perfit update` itself, a
process of its own whose vault keeps ten versions of the shift. Its cloud serves a thin random model of
that width (4 blocks, small heads: what a device does depends on the width alone). Its resident memory,
in 10⁶ bytes, is read from /proc while it trains: the median, how the last quarter's differs from the
second's, and the highest moment, which is a checkpoint's; then the highest before, Argon2id's when the
vault opens.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import common
import numpy as np
from threadpoolctl import threadpool_limits

from perfit_device import personal, process_limits
from perfit_device.personal import MOST_VERSIONS
from perfit_device.profile import Profile
from perfit_device.settings import DeviceSettings
from perfit_device.shift_versions import PersonalShift
from perfit_shared.errors import KEPT_OUT
from perfit_shared.optimizer import OptimizerConfig, StiefelAdamW
from perfit_shared.presets import preset_for
from perfit_shared.shifts import ShiftSpec, ShiftTensors
from perfit_shared.training import Schedule, Track, Training

sys.path.append(str(Path(__file__).resolve().parents[1]))
import tiny
from local import BIN, PASSPHRASE, Device, LocalCloud

_TASK = next(task for task in tiny.TASKS if task.name == "news_headline")
_PRESET = "news_categorize"  # the widest of Table 9
_ITEMS = 120  # of the history
_POLL_SECONDS = 0.02


@dataclass(frozen=True)
class Sizes:
    hidden_size: int
    steps: int  # of the optimizer, timed
    epochs: int  # of the update
    checkpoint: float  # seconds between two
    helps: int


FULL = Sizes(hidden_size=4096, steps=200, epochs=50, checkpoint=30.0, helps=21)
SMALL = Sizes(hidden_size=256, steps=5, epochs=2, checkpoint=1.0, helps=3)


def main() -> None:
    args = common.parser(__doc__).parse_args()
    sizes = SMALL if args.small else FULL
    spec = preset_for(_PRESET).spec(blocks=4, hidden_size=sizes.hidden_size)
    result = {"parameters": spec.personal_parameters(), **stepping(spec, sizes.steps), **helping(sizes.helps)}
    with tempfile.TemporaryDirectory() as folder:
        result |= updating(spec, sizes, Path(folder))
    print(common.table(["figure", "value"], list(result.items())))
    common.finish(result, args.json)


def stepping(spec: ShiftSpec, steps: int) -> dict[str, float]:
    """Median time of an optimizer step, and of making a checkpoint and reading it, on one core, ms."""
    rng = np.random.default_rng(0)
    tensors = ShiftTensors.identity(spec, spec.personal_rank)
    gradients = [
        ShiftTensors.from_named(
            {name: rng.standard_normal(a.shape).astype(np.float32) for name, a in tensors.named()}
        )
        for _ in range(4)
    ]
    optimizer = StiefelAdamW(OptimizerConfig(1e-4, steps))
    times = []
    process_limits.limit_process()
    with threadpool_limits(1):
        for step in range(steps):
            begun = time.perf_counter()
            tensors = optimizer.step(tensors, gradients[step % len(gradients)])
            times.append(time.perf_counter() - begun)
        tensors.check(spec, spec.personal_rank)
        training = Training(Schedule(1, 1e-4, 1, 0, steps), Track(tensors, optimizer), best=tensors)
        data = training.to_bytes()
        write = median(common.timed(training.to_bytes) for _ in range(9))
        read = median(common.timed(lambda: Training.from_bytes(data, Schedule)) for _ in range(9))
    return {
        "step_ms": 1e3 * median(times),
        "checkpoint_mb": len(data) / 1e6,
        "checkpoint_write_ms": 1e3 * write,
        "checkpoint_read_ms": 1e3 * read,
    }


def helping(times: int) -> dict[str, float]:
    """Median wall time of `perfit --help`, ms."""

    def ask() -> None:
        subprocess.run([BIN / "perfit", "--help"], check=True, capture_output=True)

    return {"help_ms": 1e3 * median(common.timed(ask) for _ in range(times))}


def updating(spec: ShiftSpec, sizes: Sizes, folder: Path) -> dict[str, Any]:
    """Resident memory of `perfit update`, MB."""
    with thin_cloud(spec, folder) as cloud:
        device = Device(folder / "homes", "bench")
        device("enroll", "-", text=cloud.invite())
        history = folder / "history.jsonl"
        history.write_text("".join(json.dumps(item) + "\n" for item in tiny.headlines(_ITEMS)), "utf-8")
        device("history", "import", str(history), "--task", _TASK.name)
        fill(device)
        said = folder / "said.txt"
        flags = ("--epochs", str(sizes.epochs), "--lr", "1e-4", "--checkpoint", str(sizes.checkpoint))
        with said.open("w") as stderr:
            process = subprocess.Popen(
                device.command("update", *flags), env={**os.environ, **device.env}, stderr=stderr
            )
            return watch(process, said)


def fill(device: Device) -> None:
    """Ten versions of the shift, all of them the seed."""
    settings = DeviceSettings(device.profile, Path(device.env["PERFIT_HOME"]))
    with Profile.open(settings, passphrase=lambda: PASSPHRASE) as profile, profile.vault() as vault:
        cloud, info = profile.connect()
        artefact = profile.artefact(None)
        shift = PersonalShift(cloud.fetch_seed(artefact), updates=1)
        for _ in range(MOST_VERSIONS):
            personal.store(vault, info.cloud_id, artefact, shift)


def watch(process: subprocess.Popen[bytes], said: Path) -> dict[str, Any]:
    """Memory of a running update from its first step to its end."""
    status, before = Path(f"/proc/{process.pid}/status"), 0.0
    while process.poll() is None and "step 1/" not in said.read_text("utf-8"):
        before = resident(status).get("VmHWM", before)
        time.sleep(_POLL_SECONDS)
    if process.poll() is None:
        Path(f"/proc/{process.pid}/clear_refs").write_text("5")  # the highest moment counts from here
    samples, highest = [], 0.0
    while process.poll() is None:
        now = resident(status)
        if "VmRSS" in now:
            samples.append(now["VmRSS"])
            highest = now["VmHWM"]
        time.sleep(_POLL_SECONDS)
    if process.returncode not in (0, KEPT_OUT) or len(samples) < 8:
        raise SystemExit(f"no update to measure: {said.read_text('utf-8')}")
    quarter = len(samples) // 4
    return {
        "rss_mb": median(samples),
        "rss_growth_mb": median(samples[-quarter:]) - median(samples[quarter : 2 * quarter]),
        "rss_highest_mb": highest,
        "rss_unlock_mb": before,
    }


def resident(status: Path) -> dict[str, float]:
    """VmRSS and VmHWM, MB; empty once the process has ended."""
    try:
        lines = status.read_text("ascii").splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return {}
    parts = [line.split() for line in lines if line.startswith(("VmRSS", "VmHWM"))]
    return {name.rstrip(":"): int(kib) * 1024 / 1e6 for name, kib, _ in parts}


@contextmanager
def thin_cloud(spec: ShiftSpec, folder: Path) -> Iterator[LocalCloud]:
    """A cloud for shifts of `spec`, whose model is as wide as they are and small otherwise."""
    model = folder / "model"
    shape = tiny.Shape(spec.hidden_size, 64, 4, 4, 1, head_dim=8, initializer_range=0.02)
    base = tiny.save_model(model, shape=shape)
    collective = ShiftTensors.identity(spec, spec.collective_rank, seed=1)
    artefact = replace(tiny.artefact_of(base, _TASK, spec, collective, seed=2), learning_rate=1e-4)
    artefact.save(folder / "artefact")
    with LocalCloud(model, [folder / "artefact"], folder / "cloud") as cloud:
        yield cloud


if __name__ == "__main__":
    main()
