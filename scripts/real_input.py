"""Real people, real processes, real RPCs: the tables "on devices" of docs/results.md.

    python scripts/real_input.py --data ../shared/data/commits --users 12 \\
        --artefact cloud/perfit_cloud/artefacts/commit_message --out runs/devices/commits

One cloud, and for each person of `user_top_100_history.json` a device that enrols, imports that person's
history, updates, and evaluates on the held-out queries; someone else's shift is the next person's who has
one. An interrupted run goes on where it stopped. Prints a table, and writes figures without texts to
`--json FILE` (default docs/results/devices/TASK.json).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from local import Device, LocalCloud
from perfit_shared.metrics import measure

ROOT = Path(__file__).resolve().parents[1]
MODES = ("base", "collective", "seed", "personal", "other")
_BESIDE = {"rouge_1": ("rouge_1", "rouge_l"), "accuracy": ("accuracy",)}  # metrics of a task's answers


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


@dataclass(frozen=True)
class Person:
    """One person's device and files."""

    user: str
    task: str
    history: Path
    work: Path

    @property
    def device(self) -> Device:
        return Device(self.work / "homes", self.user)

    @property
    def shift(self) -> Path:
        return self.work / f"{self.user}.safetensors"

    def enrol(self, invite: str) -> None:
        """Enrol the device and import the history, once."""
        device = self.device
        if not (Path(device.env["PERFIT_HOME"]) / "profiles" / device.profile).exists():
            device("enroll", "-", text=invite)
            device("history", "import", str(self.history), "--task", self.task, "--user", self.user)

    def update(self, cloud: LocalCloud) -> dict[str, Any]:
        done = self.work / f"{self.user}.update.json"
        if not done.exists():
            self.enrol(cloud.invite())
            result = self.device.json("update", "--task", self.task)
            if result["gate"]["accepted"]:
                self.device("export", "--shift", str(self.shift), "--task", self.task)
            done.write_text(json.dumps(result))
            say(f"{self.user}: updated in {result['seconds']:.0f} s, gate {result['gate']}")
        return dict(json.loads(done.read_text()))

    def evaluate(self, other: Path) -> dict[str, Any]:
        done = self.work / f"{self.user}.evaluate.json"
        if not done.exists():
            flags = ("--shift", str(other), "--with-seed", "--answers")
            result = self.device.json("evaluate", "--task", self.task, *flags)
            done.write_text(json.dumps(result))
            say(f"{self.user}: loss {result['loss']}")
        return dict(json.loads(done.read_text()))


def figures(user: str, update: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    """One person's, without texts."""
    golds = [answer["gold"] for answer in found["answers"]]
    return {
        "user_id": user,
        "examples": found["examples"],
        "update_seconds": round(update["seconds"], 1),
        "accepted": update["gate"]["accepted"],
        "loss": found["loss"],
        **{
            name: {mode: measure(name, [a[mode] for a in found["answers"]], golds) for mode in MODES}
            for name in _BESIDE[found["metric"]["name"]]
        },
    }


def table(task: str, rows: Sequence[Mapping[str, Any]]) -> str:
    names = [name for name in ("loss", "rouge_1", "rouge_l", "accuracy") if name in rows[0]]
    lines = [f"| {task}, {len(rows)} people | " + " | ".join(MODES) + " |", "|---|---|---|---|---|---|"]
    for name in names:
        means = (statistics.mean(row[name][mode] for row in rows) for mode in MODES)
        lines.append(f"| {name} | " + " | ".join(f"{mean:.3f}" for mean in means) + " |")
    for mode in ("collective", "seed", "other"):
        better = sum(row["loss"]["personal"] < row["loss"][mode] for row in rows)
        lines.append(f"\npersonal has a lower loss than {mode} for {better} of {len(rows)}")
    seconds = statistics.median(row["update_seconds"] for row in rows)
    refused = sum(not row["accepted"] for row in rows)
    lines.append(f"\nupdates: median {seconds:.0f} s; the gate refused {refused}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with user_top_100_history.json")
    parser.add_argument("--artefact", type=Path, required=True)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--users", type=int, default=12, help="the first N people")
    parser.add_argument("--at-once", type=int, default=2, help="devices that work at the same time")
    args = parser.parse_args()
    task = json.loads((args.artefact / "artefact.json").read_text())["task"]["name"]
    history = args.data / "user_top_100_history.json"
    args.out.mkdir(parents=True, exist_ok=True)
    users = [str(user["user_id"]) for user in json.loads(history.read_text())][: args.users]
    people = [Person(user, task, history, args.out) for user in users]
    with (
        LocalCloud(args.model, [args.artefact], args.out / "cloud") as cloud,
        ThreadPoolExecutor(args.at_once) as pool,
    ):
        updates = list(pool.map(lambda person: person.update(cloud), people))
        # A person whose update the gate refused has no shift to lend.
        lent = [
            next(p.shift for p in [*people[at + 1 :], *people[:at]] if p.shift.exists())
            for at in range(len(people))
        ]
        found = list(pool.map(Person.evaluate, people, lent))
    rows = [figures(*row) for row in zip(users, updates, found, strict=True)]
    print(table(task, rows), flush=True)
    out = args.json or ROOT / "docs" / "results" / "devices" / f"{task}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"users": rows}, indent=1))


if __name__ == "__main__":
    main()
