"""What an update frees goes back to the system, and numpy's BLAS stays on one thread."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

# Blocks as large as a step's arrays, between small ones that stay.
_PROGRAM = """
import sys
from perfit_device import process_limits
if sys.argv[1] == "small":
    process_limits.limit_process()
import numpy as np
from threadpoolctl import threadpool_info

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 1e6

bytes(8 << 20)  # freed at once: glibc takes blocks of that size from the heap from now on
before = resident()
blocks = [(np.ones(1 << 17, np.float32), bytes(100_000)) for _ in range(100)]
stay = [small for _, small in blocks]
del blocks
if sys.argv[1] == "small":
    process_limits.release_memory()
print(resident() - before, max(library["num_threads"] for library in threadpool_info()))
"""


def run(how: str) -> tuple[float, int]:
    """MB that stayed beyond those before, and BLAS threads."""
    command = [sys.executable, "-c", _PROGRAM, how]
    done = subprocess.run(command, env={}, capture_output=True, text=True, check=True)
    kept, threads = done.stdout.split()
    return float(kept), int(threads)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="needs glibc")
def test_freed_blocks_go_back_and_blas_stays_alone() -> None:
    kept, threads = run("small")
    assert kept < 20  # 52 were freed, 10 stay
    assert threads == 1
    assert run("as it is")[0] > 50  # else the test shows nothing


def test_the_command_comes_before_numpy() -> None:
    """Which reads the number of threads once, as it is imported."""
    program = "import sys, perfit_device.cli.main, perfit_device.cli.update; sys.exit('numpy' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)
