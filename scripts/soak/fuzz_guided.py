"""The targets of soak.fuzz without the live cloud, led by coverage: atheris (libFuzzer) chooses the inputs.

    PYTHONPATH=scripts .venv/bin/python -m soak.fuzz_guided --inputs 200000 --seed 1 --json guided.json
    PYTHONPATH=scripts .venv/bin/python -m soak.fuzz_guided --only "tasks" --corpus corpus/

perfit's own modules are instrumented; the bytes that reach new branches of them are kept and changed further,
and hypothesis makes an input of a target out of them. It wants `pip install atheris`, which has wheels for
Linux.
Ends at the first input that does harm, with its traceback, and leaves it in a file `crash-…`.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from hypothesis import HealthCheck, given, settings

__all__ = ["main"]

_PACKAGES = ["perfit_shared", "perfit_device", "perfit_cloud"]
_NOTE_EVERY = 1_000  # inputs: libFuzzer ends the process by itself


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", help="targets whose names hold this")
    parser.add_argument("--corpus", type=Path, help="folder where inputs are kept from run to run")
    parser.add_argument("--json", type=Path, help="where the counts go")
    args = parser.parse_args(arguments)
    try:
        import atheris
    except ImportError:
        parser.error("this needs atheris: pip install atheris")
    from soak.fuzz import offline_targets

    with tempfile.TemporaryDirectory() as folder:
        with atheris.instrument_imports(include=_PACKAGES):
            made = offline_targets(Path(folder))
        tests = _Tests([t for t in made if args.only is None or args.only in t.name], args)
        if args.corpus is not None:
            args.corpus.mkdir(parents=True, exist_ok=True)
        flags = [f"-atheris_runs={args.inputs}", f"-seed={args.seed}", "-max_len=4096", "-len_control=0"]
        atheris.Setup([sys.argv[0], *flags, *([str(args.corpus)] if args.corpus else [])], tests)
        atheris.Fuzz()
    return 0


class _Tests:
    """The first byte chooses the target, the others are hypothesis's choices."""

    def __init__(self, targets: Sequence[object], args: argparse.Namespace) -> None:
        self._names = [target.name for target in targets]
        self._runs = [_run_of(target) for target in targets]
        self._counts: Counter[str] = Counter()
        self._args, self._begun, self._inputs = args, time.monotonic(), 0

    def __call__(self, data: bytes) -> None:
        number = data[0] % len(self._runs) if data else 0
        # None: hypothesis could make no input of them, as of too few bytes.
        if self._runs[number](data[1:]) is not None:
            self._counts[self._names[number]] += 1
        self._inputs += 1
        if self._inputs % _NOTE_EVERY == 0 or self._inputs == self._args.inputs:
            self._note()

    def _note(self) -> None:
        result = {
            "inputs": self._inputs,
            "made": sum(self._counts.values()),
            "seed": self._args.seed,
            "seconds": time.monotonic() - self._begun,
            "targets": dict(self._counts.most_common()),
        }
        if self._args.json is not None:
            self._args.json.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
        if self._inputs == self._args.inputs:
            print(json.dumps(result), flush=True)


def _run_of(target: object) -> Callable[[bytes], bytes | None]:
    from soak.fuzzing.checking import outcome_of

    @settings(database=None, deadline=None, suppress_health_check=list(HealthCheck))
    @given(target.inputs)
    def run(value: object) -> None:
        outcome_of(target.check, value)

    return run.hypothesis.fuzz_one_input


if __name__ == "__main__":
    sys.exit(main())
