"""`perfit-cloud serve --tensor-parallel 2`, asked by a device over the wire, beside our own engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tiny
from local import Device, LocalCloud
from perfit_cloud.audit.memory import processes_of
from tests.support.vllm_engines import dividing

TASK = "news_headline"
ASK = ("ask", "the licensor grants you a licence to copy the work", "--task", TASK, "--temperature", "0")


@dividing
def test_two_workers_say_to_a_device_what_our_own_engine_says(tmp_path: Path) -> None:
    """In each mode, with a shift that the device trained; updates go on beside the workers."""
    made = tiny.build(tmp_path / "made", shape=tiny.SMALL)
    history, shift = tmp_path / "history.jsonl", tmp_path / "mine.safetensors"
    history.write_text("\n".join(json.dumps(item) for item in tiny.headlines(24)))

    with LocalCloud(made.model, made.artefacts, tmp_path / "own", flags=["--engine", "own"]) as cloud:
        first = enrolled(cloud, tmp_path, "first")
        trained(first, history)
        first("export", "--shift", str(shift), "--task", TASK)
        expected = first.json(*ASK, "--compare")["answers"]

    flags = ["--engine", "vllm", "--tensor-parallel", "2"]
    with LocalCloud(made.model, made.artefacts, tmp_path / "divided", flags=flags) as cloud:
        second = enrolled(cloud, tmp_path, "second")
        second("import", "--shift", str(shift))
        answers = second.json(*ASK, "--compare")["answers"]
        trained(second, history)
        running = processes_of(cloud.process.pid)
    assert len(set(expected.values())) == 3, "the modes are alike: the test shows nothing"
    assert len(running) >= 3, "the server and two workers"
    assert answers == expected
    assert cloud.process.returncode == 0
    assert "cut off" not in cloud.log.read_text()


def enrolled(cloud: LocalCloud, folder: Path, name: str) -> Device:
    device = Device(folder / name, name)
    device("enroll", "-", text=cloud.invite())
    return device


def trained(device: Device, history: Path) -> Any:
    device("history", "import", str(history), "--task", TASK)
    update = device.json("update", "--task", TASK, "--epochs", "4", "--lr", "0.02")
    assert update["loss_last"] < update["loss_first"]
