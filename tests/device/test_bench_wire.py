"""What a query and a step of an update weigh, by the benchmark's own count."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "bench" / "wire.py"


def test_a_query_and_a_step_stay_light(tmp_path: Path) -> None:
    """At Llama-2-7B's shapes with the preset of LaMP-2M: 65,536 numbers and their biases."""
    file = tmp_path / "wire.json"
    subprocess.run([sys.executable, SCRIPT, "--json", file], check=True, capture_output=True, timeout=120)
    result = json.loads(file.read_text("utf-8"))
    assert 65_536 < result["query_bytes"] <= 70_000
    assert 2 * 2 * 65_536 < result["step_bytes"] <= 270_000
    by_form = {row["form"]: row["query_bytes"] for row in result["forms"]}
    assert by_form["int8"] < by_form["float16"] / 1.9 < by_form["float32"] / 3.7
