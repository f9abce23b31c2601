"""A thread that overwrites what finished calls left in memory that no allocator reports.

It scrubs, shortly after a call has ended:

- reference cycles: an error keeps the frames that it passed through, gRPC keeps the error of a caller who
  left, and Python's collector runs only after many more calls;
- numpy's cache of small arrays, MKL's copies of matrices, torch's cache of CUDA memory, and the blocks that
  our own free() caches. `MKL_DISABLE_FAST_MM` would avoid MKL's copies; it makes a gradient a third slower.

Dead stack is different: only the thread that owns a stack may overwrite it. Each thread does so at the end
of its pass and of its call (`hardening/stacks.py`).
"""

from __future__ import annotations

import ctypes
import errno
import gc
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from perfit_cloud.hardening.allocator import take_cached
from perfit_cloud.hardening.stacks import DeadStacks

__all__ = ["MemoryScrubber", "overwrite_small_arrays"]

_log = logging.getLogger(__name__)

_QUIET_SECONDS = 0.5  # scrub this long after a call's end, if no other call ends
_LATEST_SECONDS = 2.0  # from a call's end to a scrub at most, however many end meanwhile
_AGAIN_SECONDS = (1.0, 3.0)  # to the next scrubs, for threads of the call that end a little later
# numpy's cache (multiarray/alloc.c): blocks of each size, and the first size, in bytes, that is not cached.
_SMALL_BLOCKS, _NOT_SMALL = 7, 1024
_TENSOR_BYTES = 1 << 22  # more than small objects of other threads could overwrite
_SMALL_CUDA = 1 << 20  # bytes: what is larger comes from torch's segments for large things (kSmallSize)


class PassLock(Protocol):
    """What the engines hold while they compute."""

    before_release: Callable[[], object]  # called at the end of every pass, in the thread that made it

    def hold(self, kind: str = ...) -> AbstractContextManager[None]:
        """No pass runs while it is held."""


class MemoryScrubber:
    """A thread that scrubs after calls; `call_ended` announces one."""

    def __init__(
        self,
        devices: Sequence[torch.device],
        pass_lock: PassLock,
        *,
        clock: Callable[[], float] = time.monotonic,
        ended: threading.Event | None = None,
    ) -> None:
        """All engines on the model's devices share `pass_lock`. `ended` is set when a call has ended."""
        self._devices, self._pass_lock = devices, pass_lock
        self._free_buffers = _of_mkl()
        self._stacks = DeadStacks(torch.get_num_threads())
        self._clock, self._ended = clock, ended or threading.Event()
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="perfit-scrubber", daemon=True)

    def start(self) -> None:
        """Start the thread. The collector skips what exists now: the model and the libraries, which stay."""
        self._pass_lock.before_release = self._stacks.overwrite_all
        self.scrub()
        gc.freeze()
        self._thread.start()

    def call_ended(self) -> None:
        """Overwrite what the call left on the stack of this thread, and scrub in a moment."""
        if self._thread.is_alive():
            self._stacks.overwrite()
            self._ended.set()

    def close(self) -> None:
        self._is_closed = True
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()

    def scrub(self) -> None:
        gc.collect()
        overwrite_small_arrays()
        # While this holds the lock, no pass has a buffer in use and none asks for the blocks taken here.
        with ExitStack() as after, self._pass_lock.hold("sweep"):
            self._free_buffers()
            after.callback(take_cached())
            for device in self._devices:
                if device.type == "cuda":
                    _overwrite_free_blocks(device)
        self._stacks.overwrite_ended()

    def overwrites_stacks(self) -> bool:
        """Tried, in threads of all kinds that compute."""
        return self._stacks.overwrites()

    def overwrites_tensors(self) -> bool:
        """Tried, because a build of torch may bring an allocator of its own, beyond our settings."""
        secret = os.urandom(_TENSOR_BYTES)
        found = bytearray(len(secret))  # allocated first, or it would get the tensor's memory
        tensor = torch.frombuffer(bytearray(secret), dtype=torch.uint8).clone()
        address = tensor.data_ptr()
        del tensor
        self.scrub()
        _read(address, found)
        return not any(found[at : at + 16] == secret[at : at + 16] for at in range(0, len(secret), 16))

    def _run(self) -> None:
        again: tuple[float, ...] = ()
        while not self._is_closed:
            if self._ended.wait(again[0] if again else None):
                latest = self._clock() + _LATEST_SECONDS
                while self._ended.wait(min(_QUIET_SECONDS, max(0.0, latest - self._clock()))):
                    self._ended.clear()
                    if self._is_closed or self._clock() >= latest:
                        break
                again = _AGAIN_SECONDS
            else:
                again = again[1:]
            try:
                self.scrub()
            except Exception as error:  # a device out of memory: the next scrub tries again
                _log.error("what calls left could not be scrubbed: %s", type(error).__name__)


def _of_mkl() -> Callable[[], object]:
    """MKL's `mkl_free_buffers`, by its name inside torch. The allocator overwrites what it frees."""
    if not torch.backends.mkl.is_available():  # type: ignore[no-untyped-call]
        return lambda: None
    for library in (Path(torch.__file__).parent / "lib").glob("*torch_cpu.*"):
        free: Callable[[], object] | None = getattr(ctypes.CDLL(str(library)), "mkl_serv_free_buffers", None)
        if free is not None:
            return free
    _log.warning(
        "this build of torch does not let go of the buffers of its MKL, so traces of calls may stay in "
        "memory; serve with the version of torch in constraints.txt"
    )
    return lambda: None


def _read(address: int, into: bytearray) -> None:
    """Read memory into `into`, which stays as it is if that memory is gone."""

    class Part(ctypes.Structure):  # struct iovec
        _fields_ = (("start", ctypes.c_void_p), ("size", ctypes.c_size_t))

    here = Part(ctypes.addressof(ctypes.c_char.from_buffer(into)), len(into))
    there = Part(address, len(into))
    count, none = ctypes.c_ulong(1), ctypes.c_ulong(0)
    read = ctypes.CDLL(None, use_errno=True).process_vm_readv  # process_vm_readv(2)
    got = read(os.getpid(), ctypes.byref(here), count, ctypes.byref(there), count, none)
    if got < 0 and ctypes.get_errno() != errno.EFAULT:  # a container may forbid it
        ctypes.memmove(here.start, there.start, len(into))


def overwrite_small_arrays() -> None:
    """Overwrite freed small arrays: take all of numpy's cache, filled with zeros."""
    for size in range(1, _NOT_SMALL):
        taken = [np.zeros(size, np.uint8) for _ in range(_SMALL_BLOCKS)]
        del taken  # all at once, or numpy would give the same block again


def _overwrite_free_blocks(device: torch.device) -> None:
    """Overwrite the free memory of torch's cache on a CUDA device: take every block, and fill it.

    The cache gives the smallest block that suffices, so this asks for the largest first. From its segments
    for small tensors it gives no more than _SMALL_CUDA at once, so larger free blocks there are taken in
    parts.
    """
    torch.cuda.synchronize(device)
    sizes: list[int] = []
    for segment in torch.cuda.memory_snapshot():  # type: ignore[no-untyped-call]
        if segment["device"] == (device.index or 0):
            free = [block["size"] for block in segment["blocks"] if block["state"] == "inactive"]
            most = _SMALL_CUDA if segment["segment_type"] == "small" else max(free, default=1)
            sizes += [min(most, size - at) for size in free for at in range(0, size, most)]
    taken = [torch.empty(size, dtype=torch.uint8, device=device) for size in sorted(sizes, reverse=True)]
    for block in taken:
        block.zero_()
    torch.cuda.synchronize(device)
