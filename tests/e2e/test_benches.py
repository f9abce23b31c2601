"""Benchmarks of the device and of the wire run with --small and write what they promise."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.support.benches import bench

pytestmark = pytest.mark.slow


def test_agent(tmp_path: Path) -> None:
    result = bench(tmp_path, "agent.py")
    assert result["cloud_ms"] > 0 and result["command_ms"] > 0 and result["passphrase_ms"] > 0
    assert 0 < result["idle_mb"] < result["endpoint_mb"] and result["idle_mb"] < result["updating_highest_mb"]
    assert result["ask_p95_ms"] > 0 and result["ask_p95_updating_ms"] > 0 and result["steps_beside"] > 0


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


def test_analyze(tmp_path: Path) -> None:
    result = bench(tmp_path, "analyze.py", "--pairs", "1")
    assert result["ratio"][0] > 0 and result["peak_rss_mb"] > 0 and len(result["seconds"]["ours"]) == 1


def test_sealing(tmp_path: Path) -> None:
    result = bench(tmp_path, "sealing.py")
    rows = {row["call"]: row for row in result["bytes"]}
    assert rows.keys() == {"first", "answer", "score", "gradient"}
    # An answer comes in as many pieces as the moment makes of it, a Score in one.
    assert rows["score"]["sealing"] > 1000 and rows["score"]["padding"] > 0
    assert all(1168 < row["without_further_responses"] < 1600 for row in result["added"])  # HPKE's and more
    assert 0 < result["own_share"] < 1 and result["own_ms"] > 0


def test_hardening(tmp_path: Path) -> None:
    rows = {row["call"]: row for row in bench(tmp_path, "hardening.py")["rows"]}
    assert rows.keys() == {"answer", "score", "gradient"}
