"""Benchmarks run small, in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def bench(place: Path, script: str, *flags: str) -> dict[str, Any]:
    """What `script --small` writes."""
    file = place / "result.json"
    subprocess.run(
        [sys.executable, ROOT / "scripts" / "bench" / script, "--small", "--json", file, *flags],
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
    )
    result: dict[str, Any] = json.loads(file.read_text())
    assert result["machine"]["cpu"]
    return result
