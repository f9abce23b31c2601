"""Another process, looked at from outside: its memory, its open files, and folders that it may write.

It reads only what the kernel shows under /proc, so the process need not help, or even know. The process is
stopped meanwhile, so nothing moves.

Left out: mapped files that the process cannot write (code and weights, the same bytes as on disk), and
pages of anonymous memory that were never touched or were given back, which hold nothing. A look may
get the pages of one before the secret was sent: pages that did not change since cannot hold it, and are read
but not searched. GPU memory cannot be seen from here.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import stat
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from perfit_cloud.audit.search import MARGIN, Index, Match
from perfit_shared.errors import ConfigError, PerfitError

__all__ = [
    "Found",
    "Look",
    "Pages",
    "check_allowed",
    "cpu_seconds",
    "look_at",
    "processes_of",
    "settle",
    "stopped",
]

_PAGE = os.sysconf("SC_PAGE_SIZE")
_TICKS = os.sysconf("SC_CLK_TCK")  # a second
_IN_USE = np.uint64(3 << 62)  # of an entry of pagemap: in memory, or swapped out
# A page's fingerprint is the sum of its words times these: odd, random, and nobody else's.
_FACTORS = np.frombuffer(os.urandom(_PAGE), np.uint64) | np.uint64(1)
_POLL_SECONDS = 0.1
_SETTLE_SECONDS = 60.0
_CHUNK_BYTES = 2**22  # bytes read at a time
_LINE = re.compile(r"(\w+)-(\w+) (\S+) \w+ \S+ (\d+)\s*(.*)")
Keys = npt.NDArray[np.uint64]
_KERNELS_OWN = ("[vvar", "[vsyscall]", "[vdso]")
_STATUS = Path("/proc/self/status")
_CAP_SYS_PTRACE = 19
_NOT_ALLOWED = (
    "looking into the server's memory needs CAP_SYS_PTRACE; run it as root, or give the interpreter that "
    "capability with `setcap cap_sys_ptrace+ep`"
)


@dataclass(frozen=True)
class Found:
    """Runs of one needle in one kind of place. Says nothing of what they hold."""

    needle: int  # its number in the index
    where: str  # "heap", "stack", "stack of a thread", "anonymous memory", a mapped file's name, "file NAME"
    blocks: int  # aligned blocks that belong to such runs
    address: int  # of the first; an offset in a file
    spans: frozenset[tuple[int, int, int]]  # (part, start, stop) of the needle


class Pages:
    """What the pages of processes held, by fingerprints of 64 bits."""

    def __init__(self) -> None:
        self._prints: dict[tuple[int, int], np.uint64] = {}  # by process and address

    def add(self, pid: int, start: int, prints: Keys) -> None:
        addresses = range(start, start + len(prints) * _PAGE, _PAGE)
        self._prints.update(((pid, at), of_page) for at, of_page in zip(addresses, prints, strict=True))

    def differ(self, pid: int, start: int, prints: Keys) -> npt.NDArray[np.bool_]:
        """Which of the pages from `start` on held something else, or nothing."""
        addresses = range(start, start + len(prints) * _PAGE, _PAGE)
        total = [self._prints.get((pid, at)) for at in addresses]
        return np.array([k is None or k != p for k, p in zip(total, prints, strict=True)], bool)


@dataclass(frozen=True)
class Look:
    """What one look at a process found."""

    found: tuple[Found, ...]
    searched: int  # bytes, unchanged pages included
    unreadable: tuple[str, ...]  # regions and files that could not be read, and why
    pages: Pages  # of memory; empty where an earlier look's were given


@dataclass(frozen=True)
class _Region:
    start: int
    stop: int
    where: str
    is_private: bool  # anonymous: its unused pages hold nothing


def check_allowed() -> None:
    """Raises ConfigError when this process may not look into others."""
    if not _STATUS.exists():
        raise ConfigError("an audit needs Linux: it looks into the server by /proc")
    effective = re.search(r"^CapEff:\s*(\w+)", _STATUS.read_text(), re.MULTILINE)
    if effective is None or not int(effective[1], 16) >> _CAP_SYS_PTRACE & 1:
        raise ConfigError(_NOT_ALLOWED)


def processes_of(pid: int) -> list[int]:
    """The process and all its descendants."""
    tree = [pid]
    for process in tree:
        with contextlib.suppress(OSError):
            for children in Path(f"/proc/{process}/task").glob("*/children"):
                tree += [int(child) for child in children.read_text().split()]
    return tree


@contextlib.contextmanager
def stopped(pid: int) -> Iterator[None]:
    """Hold the process and its descendants for the length of a block."""
    tree = processes_of(pid)
    for process in tree:
        os.kill(process, signal.SIGSTOP)
    try:
        end = time.monotonic() + 10
        while any(_state(process) not in "TtZ" for process in tree) and time.monotonic() < end:
            time.sleep(0.001)
        yield
    finally:
        for process in tree:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGCONT)


def settle(pid: int, *, rest: float = 0.3) -> None:
    """Wait until the process has been nearly idle for `rest` seconds.

    Raises PerfitError when it is not so within a minute.
    """
    end, quiet, before = time.monotonic() + _SETTLE_SECONDS, 0, cpu_seconds(pid)
    while quiet * _POLL_SECONDS < rest:
        if time.monotonic() > end:
            raise PerfitError(
                "the server does not come to rest; audit it on a machine that does nothing else"
            )
        time.sleep(_POLL_SECONDS)
        now = cpu_seconds(pid)
        quiet = quiet + 1 if now - before < 0.015 else 0
        before = now


def look_at(pid: int, index: Index, folders: Sequence[Path] = (), *, since: Pages | None = None) -> Look:
    """Search the memory and open files of a process and its descendants, and all files in `folders`.

    Of memory only what changed `since` a look before the secrets were sent. Raises ConfigError when the
    kernel does not let us.
    """
    found: dict[tuple[int, str], Match] = {}
    searched, unreadable, pages = 0, list[str](), Pages()
    for process in processes_of(pid):
        reader = _Reader(process, index, since, pages)
        searched += reader.search(found, unreadable)
    files = [file for process in processes_of(pid) for file in _open_files(process)]
    files += [(f"file {path.name}", path) for folder in folders for path in sorted(folder.rglob("*"))]
    seen: set[tuple[int, int]] = set()
    for where, path in files:
        try:
            about = path.stat()
            if not stat.S_ISREG(about.st_mode) or (about.st_dev, about.st_ino) in seen:
                continue
            seen.add((about.st_dev, about.st_ino))
            data = path.read_bytes()
        except OSError as error:
            unreadable.append(f"{where}: {error.strerror}")
            continue
        searched += len(data)
        for number, match in index.search_unaligned(data).items():
            found[number, where] = match
    return Look(
        tuple(Found(n, w, m.blocks, m.first, frozenset(m.spans)) for (n, w), m in sorted(found.items())),
        searched,
        tuple(unreadable),
        pages,
    )


# -- memory --------------------------------------------------------------------------------------


class _Reader:
    """The memory of one process."""

    def __init__(self, pid: int, index: Index, since: Pages | None, pages: Pages) -> None:
        """Records the pages in `pages` when there is no `since`."""
        self._pid, self._index, self._since, self._pages = pid, index, since, pages

    def search(self, found: dict[tuple[int, str], Match], unreadable: list[str]) -> int:
        """Adds to `found` and `unreadable`; returns how many bytes were looked at."""
        looked_at = 0
        buffer = np.zeros(_CHUNK_BYTES + 2 * MARGIN, np.uint8)
        with _opened(f"/proc/{self._pid}/mem") as memory, _opened(f"/proc/{self._pid}/pagemap") as pagemap:
            for region in _regions(self._pid):
                for at, end in _chunks(region, pagemap):
                    # A run may begin or end in the chunk beside this one, or in the next region.
                    low, high = _reach(memory, at, end, buffer)
                    if high < end:
                        unreadable.append(f"{region.where} at {at:#x}, {end - at} bytes")
                        continue
                    looked_at += end - at
                    data = buffer[: high - low]
                    for start, stop in self._changed(data[at - low : end - low], at):
                        # Part of a run may lie in a page that did not change.
                        first, last = max(low, start - MARGIN), min(high, stop + MARGIN)
                        for number, match in self._index.search(data, first - low, last - low).items():
                            total = found.setdefault((number, region.where), Match(first=match.first + low))
                            total.blocks += match.blocks
                            total.spans |= match.spans
        return looked_at

    def _changed(self, data: npt.NDArray[np.uint8], at: int) -> Iterable[tuple[int, int]]:
        """The parts, in addresses, of the pages that are to be searched."""
        prints = data.view(np.uint64).reshape(-1, len(_FACTORS)) @ _FACTORS
        if self._since is None:
            self._pages.add(self._pid, at, prints)
            return [(at, at + len(data))]
        return _runs(self._since.differ(self._pid, at, prints), at)


def _chunks(region: _Region, pagemap: int) -> Iterator[tuple[int, int]]:
    for start, stop in _used(region, pagemap):
        for at in range(start, stop, _CHUNK_BYTES):
            yield at, min(stop, at + _CHUNK_BYTES)


def _reach(memory: int, at: int, end: int, buffer: npt.NDArray[np.uint8]) -> tuple[int, int]:
    """Read [at, end) with a margin on both sides where that can be read: the addresses it came to."""
    low, high = at - MARGIN, end + MARGIN
    for low_, high_ in ((low, high), (low, end), (at, high), (at, end)):
        with contextlib.suppress(OSError):
            if os.preadv(memory, [buffer[: high_ - low_].data], low_) >= end - low_:
                return low_, high_
    return at, at


def _regions(pid: int) -> Iterator[_Region]:
    """What is mapped, less what cannot hold anything of a request."""
    stacks = _stack_pointers(pid)
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        fields = _LINE.match(line)
        if fields is None:
            raise PerfitError("the kernel describes memory in a way that this version does not know")
        start, stop, mode, inode, name = fields.groups()
        is_file = inode != "0"
        if name.startswith(_KERNELS_OWN) or (is_file and "w" not in mode):
            continue
        first, end = int(start, 16), int(stop, 16)
        is_stack = any(first <= pointer < end for pointer in stacks)
        unnamed = "stack of a thread" if is_stack else "anonymous memory"
        where = f"mapped {Path(name).name}" if is_file else name.strip("[]") or unnamed
        yield _Region(first, end, where, not is_file and mode.endswith("p"))


def _stack_pointers(pid: int) -> list[int]:
    """Of all threads that wait or are stopped."""
    found = []
    for file in Path(f"/proc/{pid}/task").glob("*/syscall"):
        with contextlib.suppress(OSError):  # the thread has ended
            fields = file.read_text().split()
            found += [int(pointer, 16) for pointer in fields[-2:-1]]  # the second last; "running" has none
    return found


def _used(region: _Region, pagemap: int) -> Iterator[tuple[int, int]]:
    """The parts of a region that hold anything; of shared memory and files, all of it."""
    if not region.is_private:
        yield region.start, region.stop
        return
    first, count = region.start // _PAGE, (region.stop - region.start) // _PAGE
    entries = np.frombuffer(os.pread(pagemap, 8 * count, 8 * first), np.uint64)
    if len(entries) != count:
        yield region.start, region.stop
        return
    yield from _runs((entries & _IN_USE) != 0, region.start)


def _runs(pages: npt.NDArray[np.bool_], begin: int) -> Iterator[tuple[int, int]]:
    """(start, stop) addresses of the pages in a row that are true, the first of all at `begin`."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], pages, [0]]).astype(np.int8)))
    for start, stop in edges.reshape(-1, 2).tolist():
        yield begin + start * _PAGE, begin + stop * _PAGE


# -- the rest of /proc ---------------------------------------------------------------------------


@contextlib.contextmanager
def _opened(path: str) -> Iterator[int]:
    try:
        file = os.open(path, os.O_RDONLY)
    except PermissionError:
        raise ConfigError(_NOT_ALLOWED) from None
    except OSError as error:
        raise PerfitError(f"the server is gone: {path}: {error.strerror}") from error
    try:
        yield file
    finally:
        os.close(file)


def _open_files(pid: int) -> Iterable[tuple[str, Path]]:
    """Where, and a path that opens it even when it was deleted, of what the process has open."""
    try:
        for link in sorted(Path(f"/proc/{pid}/fd").iterdir()):
            with contextlib.suppress(FileNotFoundError):  # closed since
                target = link.readlink()  # of a socket or pipe no file, as the reading of it will find
                yield f"open file {target.name}", link
    except PermissionError:
        raise ConfigError(_NOT_ALLOWED) from None


def _state(pid: int) -> str:
    """One letter: R running, S sleeping, T stopped, Z ended."""
    return _stat(pid)[0] if _stat(pid) else "Z"


def cpu_seconds(pid: int) -> float:
    """That the process and its descendants have used, in steps of a hundredth."""
    fields = [of_one for process in processes_of(pid) if (of_one := _stat(process))]
    return sum(int(of_one[11]) + int(of_one[12]) for of_one in fields) / _TICKS


def _stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat from the state on; none of a process that is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []
