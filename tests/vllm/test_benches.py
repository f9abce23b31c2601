"""Benchmarks of vLLM run with --small, and their sides do what they are named by."""

from __future__ import annotations

from pathlib import Path

from tests.support.benches import bench


def test_serving_beside_our_own_engine(tmp_path: Path) -> None:
    (row,) = bench(tmp_path, "vllm_serving.py", "--loads", "4:2")["rows"]
    assert set(row["tokens_per_second"]) == {"vllm", "vllm plain", "own", "own plain"}
    assert all(speed > 0 for speed in row["tokens_per_second"].values())
    assert row["same_answers"] == 4  # float32


def test_vllm_s_own_lora_changes_answers(tmp_path: Path) -> None:
    (row,) = bench(tmp_path, "vllm_serving.py", "--lora", "--loads", "4:2")["lora"]
    assert row["tokens_per_second"]["mixed"] > 0 < row["tokens_per_second"]["plain"]
    assert row["changed_answers"] > 0


def test_what_is_left_on_a_card_is_looked_for_in_keys_and_values_and_found_by_the_control(
    tmp_path: Path,
) -> None:
    result = bench(tmp_path, "card.py")
    left = result["left"]
    assert left["keys and values, not zero"] == 0
    assert left["control, held memory"] == 4 * left["needles"] > 0
    assert result["step_p50_ms"] > 0
