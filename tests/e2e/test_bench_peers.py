"""Benchmarks of the cloud run with --small, and both of their sides do the same work."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.support.benches import ROOT, bench

HAS_PYREFT = (ROOT / ".peers" / "pyreft" / "bin" / "python").is_file()


pytestmark = pytest.mark.slow


def test_serving(tmp_path: Path) -> None:
    result = bench(tmp_path, "serving.py")
    assert [row["distinct_users"] for row in result["rows"]] == [1, 2, 4]
    for row in result["rows"]:
        for key in ("in_flight", "tokens_per_second", "ratio_to_base", "ttft_p50", "ttft_p95"):
            assert row[key] > 0
        low, high = row["ratio_interval"]
        assert low <= row["ratio_to_base"] <= high
        assert row["ttft_p50"] <= row["ttft_p95"]
    peers = result["peers"]
    assert all(peers[name] > 0 for name in ("peft", "peft_slowdown", "static_generate"))
    assert (peers["pyreft"] is not None) == HAS_PYREFT
    if HAS_PYREFT:  # the same tensors at the same places of the same weights
        assert peers["same_answers_as_pyreft"] == 4


def test_update(tmp_path: Path) -> None:
    result = bench(tmp_path, "update.py")
    assert [row["positions"] for row in result["rows"]] == ["f7+l7", "l7"]
    for row in result["rows"]:
        assert row["max_gradient_error"] < 1e-5
        assert (row["ratio_to_pyreft"] is not None) == HAS_PYREFT
        if HAS_PYREFT:  # the same examples in the same first batch from the same start
            assert row["losses"]["pyreft"][0] == pytest.approx(row["losses"]["ours"][0], rel=1e-5)
    assert [row["n"] for row in result["devices"]] == [1, 2]
    assert all(row["steps_per_second"] > 0 for row in result["devices"])


@pytest.mark.parametrize(
    ("mode", "key"),
    [
        ("asks-during-updates", "asks_during_updates"),
        ("scaling", "scaling"),
        ("profile", "profile"),
        ("packing", "packing"),
    ],
)
def test_other_modes_of_serving(tmp_path: Path, mode: str, key: str) -> None:
    result = bench(tmp_path, "serving.py", f"--{mode}")
    found = result[key]
    if mode == "scaling":
        assert {row["in_flight"] for row in found} == {1, 4}
        assert all(row["peak_rss_mb"] > 0 and row["tokens_per_second"] > 0 for row in found)
    elif mode == "packing":
        assert [(row["in_flight"], row["same_answers"]) for row in found] == [(1, 1), (4, 4)]
    elif mode == "profile":
        assert sum(found["parts"].values()) == pytest.approx(found["seconds"])
        assert all(
            seconds > 0 for seconds in found["parts"].values()
        )  # every part is still found by its name
    else:
        assert found["updating_ttft_p95"] > 0 and found["idle_ttft_p95"] > 0
