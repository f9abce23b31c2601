"""Overwrites what returned functions left on stacks, where kernels pack matrices (stacks.c).

Without a C compiler a thread overwrites only its own stack, by ctypes, more slowly and to a fixed depth. The
stacks of torch's compute threads then stay as they are, and `overwrites` says so.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import resource
import threading
from collections.abc import Callable, Sequence

__all__ = ["DeadStacks"]

# Bytes of a call's argument. ctypes puts two copies of it on the stack, with a gap between. Each of two sizes
# covers the other's gap.
_ARGUMENTS = (256 << 10, 192 << 10)
_LEAST_STACK = 2 << 20  # bytes, for arguments that large
_TRIED = 200 << 10  # bytes
_ATTRIBUTES = 128  # bytes; more than a pthread_attr_t has
_Region = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class DeadStacks:
    """Overwrites the unused part of stacks."""

    def __init__(self, threads: int) -> None:
        """`threads`: torch's compute threads for one caller, the caller included."""
        self._threads = threads
        self._program = ctypes.CDLL(None)
        self._has_library = hasattr(self._program, "perfit_overwrite_stacks")
        self._zeros = [] if self._has_library else [_structure(bytes(size)) for size in _ARGUMENTS]
        if 0 <= resource.getrlimit(resource.RLIMIT_STACK)[0] < _LEAST_STACK:
            self._zeros = []

    def overwrite(self) -> None:
        """Overwrite the calling thread's."""
        if self._has_library:
            self._program.perfit_overwrite_stack()
        else:
            _pass_on_stack(self._zeros)

    def overwrite_all(self) -> None:
        """Overwrite the calling thread's, and those of torch's compute threads for it."""
        if self._has_library:
            self._program.perfit_overwrite_stacks(self._threads)
        else:
            _pass_on_stack(self._zeros)

    def overwrite_ended(self) -> None:
        """Overwrite those of ended threads, unless the library did so at their end."""
        if not self._has_library:  # glibc frees them when another thread ends (`hardening/process.py`)
            _in_thread(self.overwrite)

    def overwrites(self) -> bool:
        """Tried, in a new thread and in torch's compute threads for it."""
        secret, left = os.urandom(16), list[bool]()

        def work() -> None:
            deep = _structure(secret * (_TRIED // len(secret)))
            self._in_pool(lambda: _pass_on_stack([deep]))
            self.overwrite_all()
            self._in_pool(lambda: left.append(_is_on_stack(secret)))

        _in_thread(work)
        return len(left) == self._threads and not any(left)

    def _in_pool(self, do: Callable[[], object]) -> None:
        parallel = getattr(self._program, "GOMP_parallel", None)
        if self._threads == 1 or parallel is None:
            do()
        else:
            parallel(_Region(lambda _: do()), None, self._threads, 0)


def _structure(data: bytes) -> ctypes.Structure:
    class Argument(ctypes.Structure):
        _fields_ = (("bytes", ctypes.c_char * len(data)),)

    return Argument.from_buffer_copy(data)


def _pass_on_stack(arguments: Sequence[ctypes.Structure]) -> None:
    """Call a function that ignores its arguments with each of these."""
    for argument in arguments:
        ctypes.CDLL(None).getpid(argument)


def _in_thread(do: Callable[[], object]) -> None:
    thread = threading.Thread(target=do, name="perfit-stacks")
    thread.start()
    thread.join()


def _is_on_stack(secret: bytes) -> bool:
    """Whether the calling thread's stack holds it. Skips untouched pages, which reading would touch."""
    program, start, size = ctypes.CDLL(None), ctypes.c_void_p(), ctypes.c_size_t()
    program.pthread_self.restype = ctypes.c_ulong
    about = ctypes.create_string_buffer(_ATTRIBUTES)
    program.pthread_getattr_np(ctypes.c_ulong(program.pthread_self()), about)
    program.pthread_attr_getstack(about, ctypes.byref(start), ctypes.byref(size))
    program.pthread_attr_destroy(about)
    touched = (ctypes.c_ubyte * (size.value // mmap.PAGESIZE))()
    program.mincore(start, size, touched)
    pages = ((start.value or 0) + number * mmap.PAGESIZE for number, is_so in enumerate(touched) if is_so & 1)
    return any(secret in ctypes.string_at(page, mmap.PAGESIZE) for page in pages)
