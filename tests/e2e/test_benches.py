"""Benchmarks of the device and of the wire run with --small and write what they promise."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.support.benches import bench

pytestmark = pytest.mark.slow


def test_device(tmp_path: Path) -> None:
    result = bench(tmp_path, "device.py")
    assert result["parameters"] == 3 * 32 * (2 * 256 + 1)
    assert result["step_ms"] > 0 and result["help_ms"] > 0
    # Argon2id's 64 MiB come before the update, and have gone by then.
    assert 0 < result["rss_mb"] <= result["rss_highest_mb"] < result["rss_unlock_mb"]
    assert result["rss_unlock_mb"] > 100


def test_stacks(tmp_path: Path) -> None:
    rows = {row["call"]: row for row in bench(tmp_path, "stacks.py")["rows"]}
    assert rows.keys() == {"answer", "score", "gradient"}
    assert all(row["turns"] >= 1 and row["overwriting_us"] > 0 for row in rows.values())


def test_wire(tmp_path: Path) -> None:
    result = bench(tmp_path, "wire.py")
    forms = {row["form"]: row for row in result["forms"]}
    assert result["query_bytes"] == forms["int8"]["query_bytes"] < forms["float16"]["query_bytes"]
    assert result["step_bytes"] == forms["float16"]["step_bytes"] < forms["float32"]["step_bytes"]
