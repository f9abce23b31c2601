"""Kill a device at random moments, and look whether anything is lost.

    PYTHONPATH=scripts .venv/bin/python -m soak.kills --kills 200 --seed 1 --json kills.json

kill −9 hits a process that changes a vault without end, commands of a real device (`enroll`, `ask`, `history
import`, `undo`, `add` and `forget`, `passphrase`, `restore`, `forget --retrain`, `unenroll`) and `perfit
update`, all against a real cloud on this machine; then commands at an agent, of which the agent is killed,
or the command.
After every kill the vault opens, and holds the state before or after the change at hand, and no change
that was told of is gone; nothing that was removed can be found in its folder; the command can be given
again. An update resumes, repeats no more than the time between checkpoints and one step (here 0.3 s;
30 s unless said otherwise) and ends where one that was not killed ends.

What is killed, and after what time, is a function of the seed; what the process was doing just then is
not. Ends with 1 when anything was wrong.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import tiny
from local import LocalCloud
from soak.killing.changes import kill_changes
from soak.killing.commands import Killed, World
from soak.killing.ownership import Owner

__all__ = ["main", "run"]

_MOST_KILLS_OF_ONE_UPDATE = 3


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="where the result goes")
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        result = run(Path(folder), kills=args.kills, seed=args.seed)
    print(json.dumps(result, indent=1))
    if args.json is not None:
        args.json.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    return 1 if result["wrong"] else 0


def run(folder: Path, *, kills: int, seed: int) -> dict[str, Any]:
    """Counts, the most that was repeated, and what was wrong."""
    model = tiny.build(folder / "tiny")
    begun = time.monotonic()
    with LocalCloud(model.model, model.artefacts, folder / "cloud") as cloud:
        world, owner = World(cloud, folder, seed), Owner(cloud, folder / "owner")
        done: list[Killed] = []
        for killed in _kills(world, owner, folder, seed):
            done.append(killed)
            if killed.wrong is not None:
                print(f"kill {len(done)}, {killed.of}: {killed.wrong}", file=sys.stderr, flush=True)
            if len(done) % 20 == 0:
                print(f"{len(done)}/{kills} kills", file=sys.stderr, flush=True)
            if len(done) >= kills:
                break
    updates = [killed for killed in done if killed.of.endswith("update")]
    return {
        "kills": len(done),
        "seed": seed,
        "seconds": round(time.monotonic() - begun, 1),
        "of": dict(Counter(killed.of for killed in done)),
        "most_repeated_seconds": max((killed.repeated_seconds for killed in updates), default=0.0),
        "most_repeated_steps": max((killed.repeated_steps for killed in updates), default=0),
        "longest_step_seconds": max((killed.longest_step_seconds for killed in updates), default=0.0),
        "largest_difference": max((killed.difference for killed in done), default=0.0),
        "wrong": [asdict(killed) for killed in done if killed.wrong is not None],
    }


def _kills(world: World, owner: Owner, folder: Path, seed: int) -> Iterator[Killed]:
    """Without end: changes, commands, what moves and ends a profile, and updates in turn.

    Commands and updates without an agent, then with one.
    """
    rng, number = random.Random(seed), 0
    while True:
        number += 1
        wrong = kill_changes(folder / f"changes{number}", seed * 1000 + number, rng)
        yield Killed("changes", wrong)
        yield from owner.kill(rng)
        for at_agent in (False, True):
            yield from world.kill_command(rng, at_agent=at_agent)
            yield from world.kill_update(rng, at_most=_MOST_KILLS_OF_ONE_UPDATE, at_agent=at_agent)


if __name__ == "__main__":
    sys.exit(main())
