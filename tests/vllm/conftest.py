"""Runs where vLLM is: `make test-vllm`. Elsewhere these tests are not collected."""

from __future__ import annotations

import importlib.util

import pytest

if importlib.util.find_spec("vllm") is None:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session")
def head_width() -> int:
    """vLLM's attention on a CPU takes heads of 32 and wider."""
    return 32


@pytest.fixture(scope="session")
def left_out() -> tuple[str, ...]:
    """vLLM refuses Qwen2 with a sliding window in some blocks only, so Qwen2 and Qwen3 have none here."""
    return ("use_sliding_window",)
