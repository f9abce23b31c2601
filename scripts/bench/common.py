"""What the benchmarks share: the machine's name, pairs that take turns, ratios with intervals, tables, JSON.

    args = parser(__doc__).parse_args()
    times = interleaved({"ours": ours, "theirs": theirs}, pairs=9)      # each call gives its own figure
    speed = ratio(times["theirs"], times["ours"])                       # .median, .low, .high
    finish({"rows": rows}, args.json)

Knows no torch: what is measured decides what is loaded.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["Peak", "Ratio", "finish", "interleaved", "machine", "parser", "ratio", "table", "timed"]

_PAIRS = 9  # fewest that a ratio is quoted from
_RESAMPLES = 10_000


@dataclass(frozen=True)
class Ratio:
    """A median of paired ratios with its 95 % bootstrap interval."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3f} [{self.low:.3f}, {self.high:.3f}]"

    def to_json(self) -> list[float]:
        """[median, low, high]."""
        return [self.median, self.low, self.high]


class Peak:
    """The most memory that this process is resident with while the block runs."""

    megabytes: float

    def __enter__(self) -> Peak:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the highest so far is forgotten
        return self

    def __exit__(self, *_: object) -> None:
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        self.megabytes = int(status["VmHWM"].split()[0]) / 1024


def parser(description: str | None) -> argparse.ArgumentParser:
    """With --json and --small; a script adds its own. Its docstring is the help."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--json", type=Path, help="where the result goes")
    made.add_argument("--small", action="store_true", help="tiny sizes: shows that it runs, measures nothing")
    return made


def timed(call: Callable[[], object]) -> float:
    """Seconds of wall clock."""
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def interleaved(
    sides: Mapping[str, Callable[[], float]], *, pairs: int = _PAIRS, warm_up: int = 1
) -> dict[str, list[float]]:
    """What every side returned, by name: `pairs` figures each, all sides once a round.

    The order turns around from round to round, so that drift falls on all alike; the figures of the
    `warm_up` rounds before are dropped.
    """
    figures: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(warm_up + pairs):
        for name in list(sides)[:: 1 if turn % 2 else -1]:
            figure = sides[name]()
            if turn >= warm_up:
                figures[name].append(figure)
    return figures


def ratio(over: Sequence[float], under: Sequence[float], *, seed: int = 0) -> Ratio:
    """Median of over[i] / under[i], with the percentile bootstrap of that median over pairs."""
    pairs = np.asarray(over, np.float64) / np.asarray(under, np.float64)
    chosen = np.random.default_rng(seed).integers(0, len(pairs), (_RESAMPLES, len(pairs)))
    low, high = np.percentile(np.median(pairs[chosen], axis=1), [2.5, 97.5])
    return Ratio(float(np.median(pairs)), float(low), float(high))


def machine() -> dict[str, Any]:
    """CPU, cores this process may use, threads and versions of what is loaded, and the GPU torch sees."""
    loaded = [name for name in ("numpy", "grpc", "torch", "transformers", "peft") if name in sys.modules]
    named: dict[str, Any] = {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": _threads(),
        "versions": {name: metadata.version({"grpc": "grpcio"}.get(name, name)) for name in loaded},
    }
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        named["gpu"] = torch.cuda.get_device_name()
    return named


def table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Markdown. Floats with three significant digits; whoever wants others gives text."""
    lines = [headers, ["---"] * len(headers), *([_cell(value) for value in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def finish(result: Mapping[str, Any], file: Path | None) -> None:
    """Name the machine on stdout, and write `result` with it to `file`."""
    at = machine()
    versions = ", ".join(f"{name} {version}" for name, version in at["versions"].items())
    where = f"{at['cpu']}, {at['cores']} cores, {at['threads']} threads"
    print(f"\n{at['gpu'] + '; ' if 'gpu' in at else ''}{where}; {versions}")
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({**result, "machine": at}, indent=1) + "\n", "utf-8")


def _cell(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return "unknown CPU"


def _threads() -> int:
    """Of torch where it is loaded, else of numpy's BLAS."""
    torch = sys.modules.get("torch")
    if torch is not None:
        return int(torch.get_num_threads())
    said = os.environ.get("OPENBLAS_NUM_THREADS") or os.environ.get("OMP_NUM_THREADS")
    return int(said) if said else len(os.sched_getaffinity(0))
