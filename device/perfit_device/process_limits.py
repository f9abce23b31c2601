"""Limits on what an update takes of the device: one core, and no unused memory.

Measured at Llama-2-7B's width with 786k numbers. numpy's BLAS starts a thread a core. On a busy machine
they wait for one another: a step of 18 ms took 900. glibc keeps freed memory for each thread: an update had
152 MB resident before its first checkpoint, and has 97 with this. Other systems than glibc's return nothing.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

__all__ = ["limit_process", "release_memory"]

_MMAP_THRESHOLD, _ARENA_MAX = -3, -8  # of malloc.h
_LARGE = 256 * 1024  # bytes


def limit_process() -> None:
    """One thread for BLAS, one heap for all threads, and large blocks that return to the system once free.

    The last costs a step 10 ms of page faults. Call it before numpy is imported and threads start.
    """
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    mallopt = _of_glibc("mallopt")
    if mallopt is not None:
        mallopt(_ARENA_MAX, 1)
        mallopt(_MMAP_THRESHOLD, _LARGE)


def release_memory() -> None:
    """Return the heap's free memory to the system; takes about 1 ms."""
    trim = _of_glibc("malloc_trim")
    if trim is not None:
        trim(0)


def _of_glibc(name: str) -> Callable[..., int] | None:
    if sys.platform != "linux":
        return None
    import ctypes

    return getattr(ctypes.CDLL(None), name, None)
