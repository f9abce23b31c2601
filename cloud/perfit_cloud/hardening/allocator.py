"""Our own free() (allocator.c), compiled at every start of a hardened server that has a C compiler.

Without one, glibc overwrites freed memory itself, more slowly: it fills memory when it gives it out, too. The
same library overwrites stacks (stacks.c, `hardening/stacks.py`).
"""

from __future__ import annotations

import ctypes
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["build", "cache_at_most", "preloading", "return_free_memory", "take_cached"]

_SOURCES = [str(Path(__file__).with_name(name)) for name in ("allocator.c", "stacks.c")]
_FLAGS, _LIBRARIES = ["-O2", "-fno-builtin", "-shared", "-fPIC"], ["-ldl"]
_SECONDS = 60  # for the compiler, and for the trial
# Aborts if another allocator is loaded before glibc's: glibc would free what it never gave.
_TRIAL = (
    "import ctypes, threading; ours = ctypes.CDLL(None); ours.perfit_take_cached; "
    "[bytearray(size) for size in range(9999)]; threading.Thread(target=ours.perfit_overwrite_stack).start()"
)


def build(environment: Mapping[str, str]) -> int | None:
    """A descriptor of the library, in memory and for the next program to inherit; None: it cannot be used.

    `environment`: of this program. A small program is tried with it first.
    """
    if platform.libc_ver()[0] != "glibc":
        return None
    try:
        built = _compiled(shlex.split(environment.get("CC", "cc")))
        held = os.memfd_create("perfit-allocator", 0)
    # No compiler, or it failed; no name of one; no folder to write to; no files in memory.
    except (OSError, ValueError, AttributeError, subprocess.SubprocessError):
        return None
    try:
        Path(f"/proc/self/fd/{held}").write_bytes(built)
        tried = {**environment, "PYTHONMALLOC": "malloc", "LD_PRELOAD": preloading(held, environment)}
        _run([sys.executable, "-c", _TRIAL], env=tried, pass_fds=[held])
    except (OSError, subprocess.SubprocessError):
        os.close(held)
        return None
    return held


def preloading(library: int, environment: Mapping[str, str]) -> str:
    """LD_PRELOAD, with what `environment` has in it."""
    theirs = environment.get("LD_PRELOAD")
    return f"/proc/self/fd/{library}" + (f":{theirs}" if theirs else "")


def cache_at_most(size: int) -> None:
    """Limit the bytes of freed tensors that wait to be overwritten. Does nothing without the library."""
    limit = getattr(ctypes.CDLL(None), "perfit_cache_at_most", None)
    if limit is not None:
        limit.argtypes = [ctypes.c_size_t]
        limit(size)


def return_free_memory() -> None:
    """Give the system back what is free inside the heaps (malloc_trim(3)). Does nothing without glibc.

    Where it is needed again it comes in page by page, so call this after a peak that does not come back.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim.argtypes = [ctypes.c_size_t]
        trim(0)


def take_cached() -> Callable[[], None]:
    """Take the memory of freed tensors; what this returns overwrites it. Does nothing without the library."""
    program = ctypes.CDLL(None)
    take, overwrite = (getattr(program, f"perfit_{name}", None) for name in ("take_cached", "overwrite"))
    if take is None or overwrite is None:
        return lambda: None
    take.restype, overwrite.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    taken = take()
    return lambda: overwrite(taken)


def _compiled(compiler: Sequence[str]) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "allocator.so"
        _run([*compiler, *_FLAGS, "-o", str(library), *_SOURCES, *_LIBRARIES])
        return library.read_bytes()


def _run(command: Sequence[str], **how: Any) -> None:
    """No pipes: a compiler's own children would hold them longer than it lives."""
    silent: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
    subprocess.run(command, check=True, timeout=_SECONDS, **silent, **how)
