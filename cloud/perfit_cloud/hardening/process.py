"""How the serving process starts, so that freed memory is overwritten and never reaches a disk.

Python's `bytes`, protobuf's messages and gRPC's buffers cannot be overwritten from here. So the allocator
overwrites what they free: our own free() (`hardening/allocator.py`), or glibc, which must be configured
before the process starts. It has to be the only allocator: Python's own, for small objects, leaves freed
memory as it was, and so do glibc's per-thread lists. `hardening/scrubber.py` handles what no allocator sees.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import platform
import resource
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from perfit_cloud.hardening.allocator import build, preloading

__all__ = [
    "UNHARDENED",
    "Hardening",
    "harden",
    "harden_child",
    "hardening_children",
    "is_hardened",
    "restart_hardened",
]

_log = logging.getLogger(__name__)

_ENVIRONMENT = {
    "PYTHONMALLOC": "malloc",  # small Python objects go to glibc as well
    # Lazy binding saves registers on the stack, and with them what was copied last.
    "LD_BIND_NOW": "1",
    "OPENBLAS_NUM_THREADS": "1",  # the buffers of numpy's BLAS: `perfit_shared.shifts` overwrites the one
}
# Turns that a thread of libgomp waits before it sleeps: its 300,000 are milliseconds, in which a thread that
# waits for another keeps the core that the other needs, where other programs run too.
_WAITING = {"GOMP_SPINCOUNT": "1000"}
# Without our own free(): glibc fills freed memory with this byte, but not blocks on these lists.
_FILLING = {"MALLOC_PERTURB_": "165"}
_FILLING_TUNABLES = {
    "glibc.malloc.tcache_count": "0",
    "glibc.pthread.stack_cache_size": "0",  # bytes; stacks of threads that ended
}
# Memory that is returned to the system comes back page by page, each to be filled. So retain it. The
# operator's own settings take precedence.
_RETAINING = {
    "glibc.malloc.arena_max": "4",  # each retains the most it ever had
    "glibc.malloc.mmap_threshold": str(32 << 20),  # bytes, as are these; the most there may be
    "glibc.malloc.trim_threshold": str(256 << 20),
    "glibc.malloc.top_pad": str(64 << 20),  # a heap's size: none is returned
}
# Under a memory ceiling, return it at once.
_RETURNING = {
    "glibc.malloc.arena_max": "2",
    "glibc.malloc.mmap_threshold": str(1 << 20),
    "glibc.malloc.trim_threshold": str(4 << 20),
    "glibc.malloc.top_pad": str(1 << 20),
}
_DESCRIPTORS = "/proc/self/fd/"
_RESTARTED = "PERFIT_RESTARTED"  # id of the process that was started again: no child takes it for its own
_PARENT = "PERFIT_HARDENS"  # id of the process whose children are to harden themselves
_libraries: list[int] = []  # the descriptor of our free(), for processes that handle calls for this one

_PR_GET_DUMPABLE, _PR_SET_DUMPABLE = 3, 4  # linux/prctl.h
_CAP_IPC_LOCK = 14  # linux/capability.h
_MCL_CURRENT, _MCL_FUTURE, _MCL_ONFAULT = 1, 2, 4  # asm-generic/mman.h


@dataclass(frozen=True)
class Hardening:
    """What holds of this process."""

    overwrites_freed: bool  # what is freed is overwritten
    overwrites_stacks: bool  # so is what functions that have returned left on stacks
    no_core_dumps: bool
    not_dumpable: bool  # no process of the same user can read its memory
    no_swap: bool  # its memory reaches no disk: it is locked, or the system has no swap


UNHARDENED = Hardening(
    overwrites_freed=False, overwrites_stacks=False, no_core_dumps=False, not_dumpable=False, no_swap=False
)


def restart_hardened(*, returns_memory: bool = False) -> None:
    """Start this program again with an allocator that overwrites what is freed; returns if it was.

    `returns_memory`: whether freed memory returns to the system at once, which takes time. Call this
    before importing anything heavy, which would be imported twice.
    """
    # The settings cannot serve as the mark: a privileged program does not receive them.
    if is_hardened() or not sys.executable:
        return
    environment = _environment(os.environ, build(os.environ), _RETURNING if returns_memory else _RETAINING)
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:  # as it is for a program that was started without
            stream.flush()
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)  # noqa: S606


def harden() -> Hardening:
    """Harden what the running process can, and check what holds. Logs what does not, and the remedy."""
    _forget_preloading()
    held = Hardening(
        overwrites_freed=_overwrites_freed(),
        overwrites_stacks=False,  # until it is tried, once torch is loaded
        no_core_dumps=_forbids_core_dumps(),
        not_dumpable=_forbids_reading(),
        no_swap=_locks_memory() or not _has_swap(),
    )
    if not held.overwrites_freed:
        _log.warning(
            "what is freed stays in memory until it is used again, so traces of calls may: serve on glibc, "
            "with no other allocator preloaded and without python's -E and -I"
        )
    if not (held.no_core_dumps and held.not_dumpable):
        _log.warning("this system does not keep others from dumping the server's memory; serve on linux")
    if not held.no_swap:
        _log.warning(
            "memory could not be locked, so traces of calls may reach the swap; turn that off, or allow "
            "locking (CAP_IPC_LOCK, or no limit on locked memory)"
        )
    return held


def is_hardened() -> bool:
    """Whether this process was started by `restart_hardened`, or is such a child of one that was."""
    return os.environ.get(_RESTARTED) == str(os.getpid())


@contextlib.contextmanager
def hardening_children() -> Iterator[int | None]:
    """While this lasts, processes that are started get what `harden_child` needs.

    They have to inherit the descriptor that this gives. None: there is none.
    """
    library = _libraries[0] if _libraries else None
    theirs = os.environ.get("LD_PRELOAD")
    if is_hardened():
        os.environ[_PARENT] = str(os.getpid())
    if library is not None:
        os.environ["LD_PRELOAD"] = preloading(library, os.environ)
    try:
        yield library
    finally:
        os.environ.pop(_PARENT, None)
        if theirs is not None:
            os.environ["LD_PRELOAD"] = theirs
        else:
            os.environ.pop("LD_PRELOAD", None)


def harden_child() -> None:
    """`harden`, where this process was started while `hardening_children` lasted. Harmless elsewhere.

    Call it early: programs that the child starts cannot load our free(), and say so.
    """
    if os.environ.get(_PARENT) == str(os.getppid()):
        del os.environ[_PARENT]
        os.environ[_RESTARTED] = str(os.getpid())
        harden()


def _environment(
    given: Mapping[str, str], library: int | None, malloc: Mapping[str, str] = _RETAINING
) -> dict[str, str]:
    """That of the new program; `library`: the descriptor of our free(), if there is one."""
    own = {} if library is not None else _FILLING_TUNABLES
    theirs = dict(part.split("=", 1) for part in given.get("GLIBC_TUNABLES", "").split(":") if "=" in part)
    tunables = ":".join(f"{name}={value}" for name, value in {**malloc, **theirs, **own}.items())
    how = _FILLING if library is None else {"LD_PRELOAD": preloading(library, given)}
    return {
        **_WAITING,
        **given,
        **_ENVIRONMENT,
        **how,
        "GLIBC_TUNABLES": tunables,
        _RESTARTED: str(os.getpid()),
    }


def _forget_preloading() -> None:
    """It is for this program only, which has loaded it, and for those that `hardening_children` names."""
    library, _, theirs = os.environ.get("LD_PRELOAD", "").partition(":")
    if not is_hardened() or not library.startswith(_DESCRIPTORS):
        return
    del os.environ["LD_PRELOAD"]
    if theirs:
        os.environ["LD_PRELOAD"] = theirs
    with contextlib.suppress(OSError, ValueError):
        os.set_inheritable(int(library.removeprefix(_DESCRIPTORS)), False)
        _libraries[:] = [int(library.removeprefix(_DESCRIPTORS))]


def _overwrites_freed() -> bool:
    """Tried: objects of several sizes are dropped, and looked for where they lay.

    Only with glibc, where that memory can still be read.
    """
    return platform.libc_ver()[0] == "glibc" and not any(map(_is_left, (40, 400, 4000)))


def _is_left(size: int) -> bool:
    """Whether 16 bytes in a row of a `bytes` object survive it."""
    secret = os.urandom(size)
    mirror = bytes(byte ^ 255 for byte in secret)  # not to be found for the secret itself
    address = id(secret) + bytes.__basicsize__ - 1
    del secret
    found = bytes(byte ^ 255 for byte in ctypes.string_at(address, size))
    return any(found[at : at + 16] == mirror[at : at + 16] for at in range(size - 15))


def _forbids_core_dumps() -> bool:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    return resource.getrlimit(resource.RLIMIT_CORE) == (0, 0)


def _forbids_reading() -> bool:
    """Make the process not dumpable: its memory and /proc entries are then root's."""
    prctl = getattr(_libc(), "prctl", None)
    if prctl is None:
        return False
    prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
    return bool(prctl(_PR_GET_DUMPABLE, 0, 0, 0, 0) == 0)


def _locks_memory() -> bool:
    """Lock all memory, now and later, each page when it is first used."""
    mlockall = getattr(_libc(), "mlockall", None)
    # Under a limit it would succeed, and allocations would fail when that is reached.
    if mlockall is None or not _may_lock_all():
        return False
    return bool(mlockall(_MCL_CURRENT | _MCL_FUTURE | _MCL_ONFAULT) == 0)


def _may_lock_all() -> bool:
    soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if resource.RLIM_INFINITY in (soft, hard):
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (hard, hard))
        return hard == resource.RLIM_INFINITY
    try:
        of_process = Path("/proc/self/status").read_text("ascii")
        users = Path("/proc/self/uid_map").read_text("ascii").split()
    except OSError:
        return False
    held = next(line for line in of_process.splitlines() if line.startswith("CapEff:"))
    # Capabilities inside a user namespace of one's own do not lift the limit.
    return bool(int(held.split()[1], 16) >> _CAP_IPC_LOCK & 1) and users == ["0", "0", str(2**32 - 1)]


def _has_swap() -> bool:
    """Whether there is any; true if that is unknown."""
    try:
        return len(Path("/proc/swaps").read_text("utf-8").splitlines()) > 1
    except OSError:
        return True


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)
