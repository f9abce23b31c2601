"""Throw bad inputs at every form that somebody else may hand to a device or a cloud, and at live ones.

    PYTHONPATH=scripts .venv/bin/python -m soak.fuzz --inputs 100000 --seed 1 --json fuzz.json
    PYTHONPATH=scripts .venv/bin/python -m soak.fuzz --only "vault files" --inputs 2000

For every input there must come a value that passes its own checks, or an exception of the PerfitError
tree, within seconds; for an RPC a status with our code, or one of gRPC's own for bytes that are no message
(soak.fuzzing.rpcs has their list). Between them an honest device asks the same questions, and must get the
same bits. Inputs are a function of the seed. Ends with 1 when anything failed, and prints the smallest
input that does.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from soak.fuzzing.checking import Tally, Target, bounded_memory, fuzz

__all__ = ["all_targets", "main", "offline_targets", "run", "shares"]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--inputs", type=int, default=100_000, help="of all targets together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="targets whose names hold this")
    parser.add_argument("--json", type=Path, help="where the result goes")
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder, all_targets(Path(folder), only=args.only) as targets:
        if not targets:
            parser.error(f'no target\'s name holds "{args.only}"')
        result = run(targets, inputs=args.inputs, seed=args.seed)
    if args.json is not None:
        args.json.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    return 1 if result["failures"] else 0


@contextmanager
def all_targets(work: Path, *, only: str | None = None) -> Iterator[list[Target]]:
    """Those whose names hold `only`; a cloud runs as long as it lasts, where one of them needs it."""
    import tiny
    from soak.fuzzing import agent, commands, rpcs

    wanted = [target for target in offline_targets(work) if only is None or only in target.name]
    with ExitStack() as stack:
        if only is None or only in commands.NAME:
            wanted += stack.enter_context(commands.targets(work / "commands"))
        if only is None or only in agent.NAME:
            wanted += stack.enter_context(agent.targets(work / "agent"))
        if any(only is None or only in name for name in rpcs.NAMES):
            live = stack.enter_context(rpcs.live(tiny.build(work / "served"), work / "live"))
            wanted += [target for target in live.targets() if only is None or only in target.name]
        yield wanted


def offline_targets(work: Path) -> list[Target]:
    """Those that need no live cloud."""
    import tiny
    from soak.fuzzing import agent, cloud, device, shared, vaults

    return [
        *shared.targets(),
        *device.targets(work / "device"),
        *vaults.targets(work / "vaults"),
        *agent.offline_targets(),
        *cloud.targets(tiny.build(work / "tiny"), work / "cloud"),
    ]


def shares(targets: Sequence[Target], inputs: int) -> list[int]:
    """How many inputs each target gets: by its share, at least one, rounded up."""
    total = sum(target.share for target in targets)
    return [max(1, -(-inputs * target.share // total)) for target in targets]


def run(targets: Sequence[Target], *, inputs: int, seed: int) -> dict[str, Any]:
    """Print a line a target, and every failure; all of it as JSON."""
    tallies: list[Tally] = []
    seeds = random.Random(seed)
    with bounded_memory():
        for target, count in zip(targets, shares(targets, inputs), strict=True):
            tally = fuzz(target, count=count, seed=seeds.getrandbits(32))
            tallies.append(tally)
            kinds = ", ".join(f"{name} {n}" for name, n in tally.outcomes.most_common(6))
            print(
                f"{tally.name:32} {tally.inputs:7} in {tally.seconds:6.1f} s, "
                f"slowest {tally.slowest * 1e3:6.0f} ms: {kinds}",
                flush=True,
            )
            for failure in tally.failures:
                print(f"  FAILED {failure['error']}\n  input  {failure['input'][:600]}", file=sys.stderr)
    total = sum(tally.inputs for tally in tallies)
    failures = sum(len(tally.failures) for tally in tallies)
    print(f"{total} inputs, {failures} ways to fail", flush=True)
    return {
        "inputs": total,
        "seed": seed,
        "failures": failures,
        "seconds": sum(tally.seconds for tally in tallies),
        "targets": [tally.to_json() for tally in tallies],
    }


if __name__ == "__main__":
    sys.exit(main())
