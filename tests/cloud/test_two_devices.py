"""A model over two devices that refuse to mix: everything that runs passes gives what one device gives.

One of the two is pretended (tests/support/cards.py), since tests have no two cards.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow  # torch for a process each
@pytest.mark.parametrize(
    ("family", "first", "second"),
    [
        ("llama", "card:0", "cpu"),
        ("llama", "cpu", "card:0"),
        ("gemma2", "cpu", "card:0"),
        ("qwen3", "card:0", "cpu"),
        ("gpt2", "card:0", "cpu"),
    ],
)
def test_what_two_devices_give_is_what_one_gives(family: str, first: str, second: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.two_devices", family, first, second],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
