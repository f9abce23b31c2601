"""Seconds of a LaMP run's people with one Ray worker and with two, each with one thread, in turn.

    python scripts/bench/ray_people.py --people 48 --rounds 3

The model is a random one and the people are invented. Seconds are those of fitting and measuring alone;
loading the model is the same for both. `cpu` are the seconds of the workers' processors: where other programs
want the same cores, two workers get less of them and the wall says little. `evenness` is all cpu over that of
the busiest worker: what workers with a core each would make of it.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import tiny
from perfit_cloud.lamp.ray_workers import RayCluster, RayWorkers
from perfit_cloud.lamp.request import LampRequest
from perfit_cloud.lamp.run import run_lamp

_WORDS = ("the", "licence", "work", "you", "may", "use", "copy", "of", "this", "other", "under", "terms")
_ASKED = "Generate a headline for the following article:"


def write_people(folder: Path, people: int) -> None:
    """Histories of like length, in OPPU's files."""
    drawn, users, golds = random.Random(0), [], []
    for user in range(people):
        entries = [
            {
                "id": f"{user:04}{n:03}",
                "date": "2024-01-01",
                "text": " ".join(drawn.choices(_WORDS, k=60)),
                "title": " ".join(drawn.choices(_WORDS, k=6)),
            }
            for n in range(26)
        ]
        asked = [
            {"id": e["id"], "input": f"Generate a headline for the following article: {e['text']}"}
            for e in entries[24:]
        ]
        golds += [{"id": e["id"], "output": e["title"]} for e in entries[24:]]
        users.append({"user_id": user, "profile": entries[:24], "query": asked})
    (folder / "user_others.json").write_text("[]")
    (folder / "user_top_100_history.json").write_text(json.dumps(users))
    (folder / "user_top_100_history_label.json").write_text(json.dumps({"task": "LaMP_4", "golds": golds}))


class Timed(RayWorkers):
    """Counts the wall and the workers' processor seconds of what they are given."""

    found: dict[str, Any]

    def _done(self, method: str, work: Sequence[Any]) -> Iterator[Any]:
        processes = [psutil.Process(each) for each in self.process_ids()]
        before, began = [_cpu(each) for each in processes], time.monotonic()
        yield from super()._done(method, work)
        cpu = [_cpu(each) - was for each, was in zip(processes, before, strict=True)]
        Timed.found[method] = {"wall": time.monotonic() - began, "cpu": cpu}


def _cpu(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--people", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    import perfit_cloud.lamp.run as lamp_run

    lamp_run.RayWorkers = Timed  # type: ignore[misc]
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = tiny.build(folder / "tiny", shape=tiny.SMALL).model
        (folder / "data").mkdir()
        write_people(folder / "data", options.people)
        for number in range(options.rounds):
            for workers in (1, 2):
                Timed.found = {}
                request = LampRequest(
                    task="news_headline",
                    model=str(model),
                    data=folder / "data",
                    out=folder / f"out-{number}-{workers}",
                    method="perfit_stage2",
                    epochs=2,
                    learning_rate=1e-3,
                    users_together=4,
                    threads=1,
                    dtype="float32",
                    device="cpu",
                )
                run_lamp(request, ray=RayCluster("local", workers))
                cpu = [
                    sum(parts) for parts in zip(*(each["cpu"] for each in Timed.found.values()), strict=True)
                ]
                wall = sum(each["wall"] for each in Timed.found.values())
                rows.append({"workers": workers, "wall": wall, "cpu": cpu, "load": psutil.getloadavg()[0]})
                print(json.dumps(rows[-1]), flush=True)
    walls = {n: statistics.median(row["wall"] for row in rows if row["workers"] == n) for n in (1, 2)}
    even = statistics.median(sum(row["cpu"]) / max(row["cpu"]) for row in rows if row["workers"] == 2)
    more = statistics.median(sum(row["cpu"]) for row in rows if row["workers"] == 2) / statistics.median(
        sum(row["cpu"]) for row in rows if row["workers"] == 1
    )
    found = {"speed": walls[1] / walls[2], "evenness": even, "cpu of two over one": more, "rows": rows}
    print(json.dumps({key: value for key, value in found.items() if key != "rows"}))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
