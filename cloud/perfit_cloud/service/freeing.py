"""A free() of our own (freeing.c), built anew at every start of a hardened server where a C compiler is.

Without one, glibc does it itself, slower: it overwrites memory when it gives it out, too.
"""

from __future__ import annotations

import ctypes
import os
import platform
import shlex
import subprocess
import tempfile
from pathlib import Path

__all__ = ["build", "overwrite_kept"]

_SOURCE = Path(__file__).with_name("freeing.c")
_FLAGS = ["-O2", "-fno-builtin", "-shared", "-fPIC"]
_BUILD_SECONDS = 60


def build() -> int | None:
    """A descriptor of the library, in memory and for the next program to inherit; None: it cannot be used.

    It can where memory is glibc's: what another allocator gave, glibc cannot free.
    """
    if platform.libc_ver()[0] != "glibc" or not _memory_is_of_libc():
        return None
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "freeing.so"
        try:
            compiler = shlex.split(os.environ.get("CC", "cc"))
            command = [*compiler, *_FLAGS, "-o", str(library), str(_SOURCE)]
            subprocess.run(command, check=True, capture_output=True, timeout=_BUILD_SECONDS)
            built = library.read_bytes()
        except (OSError, ValueError, subprocess.SubprocessError):  # none, no name of one, or it failed
            return None
    held = os.memfd_create("perfit-freeing", 0)
    try:
        place = Path(f"/proc/self/fd/{held}")
        place.write_bytes(built)
        ctypes.CDLL(str(place))  # as the next program will; it may be for another machine
    except OSError:
        os.close(held)
        return None
    return held


def overwrite_kept() -> None:
    """Overwrite the memory of tensors that was let go of and not used again; nothing without the library."""
    overwrite = getattr(ctypes.CDLL(None), "perfit_overwrite", None)
    if overwrite is not None:
        overwrite()


def _memory_is_of_libc() -> bool:
    """Whether nothing stands in front of glibc's malloc and free."""
    libraries = ctypes.CDLL(None), ctypes.CDLL("libc.so.6")
    first, glibc = ([_address(library, name) for name in ("malloc", "free")] for library in libraries)
    return first == glibc


def _address(library: ctypes.CDLL, name: str) -> int | None:
    return ctypes.cast(getattr(library, name), ctypes.c_void_p).value
