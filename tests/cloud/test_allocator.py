"""Our own free(): what it overwrites, at once and when told to, and what it leaves whole."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from tests.support.memory import looking

from perfit_cloud.audit.memory import look_at
from perfit_cloud.audit.needles import raw
from perfit_cloud.audit.search import Index
from perfit_cloud.hardening import allocator
from perfit_cloud.hardening import process as process_hardening

SIZES = {"small": 600, "middling": 40_000, "large": 1_000_000}
CHILD = """
import ctypes, sys
if "tensors" in sys.argv:
    import torch
from perfit_cloud.hardening.allocator import return_free_memory, take_cached
libc = ctypes.CDLL(None)
for name in ("malloc", "realloc"):
    getattr(libc, name).restype = ctypes.c_void_p
libc.malloc.argtypes, libc.free.argtypes = [ctypes.c_size_t], [ctypes.c_void_p]
libc.realloc.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
def put(size):
    start = libc.malloc(size)
    sys.stdin.buffer.raw.readinto((ctypes.c_char * size).from_address(start))
    return start
print("ready", flush=True)
while line := sys.stdin.buffer.raw.readline():
    exec(line)
    print("done", flush=True)
"""


@pytest.fixture(scope="module")
def library() -> Iterator[int]:
    if shutil.which("cc") is None:
        pytest.skip("our free() needs a C compiler")
    held = allocator.build(os.environ)
    assert held is not None
    yield held
    os.close(held)


class Child:
    """A process that does what it is told, with our free() or without; with torch where it makes tensors."""

    def __init__(self, library: int | None, *, tensors: bool) -> None:
        descriptors = () if library is None else (library,)
        environment = process_hardening._environment(os.environ, library)
        if library is None:
            del environment["MALLOC_PERTURB_"]
        self._process = subprocess.Popen(
            [sys.executable, "-c", CHILD, "tensors" if tensors else ""],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            pass_fds=descriptors,
            env=environment,
        )
        self._heard()

    def do(self, code: str, secret: bytes = b"") -> None:
        assert self._process.stdin
        self._process.stdin.write(code.encode() + b"\n")
        if secret:
            self._process.stdin.write(secret)
        self._heard()

    def holds(self, secret: bytes) -> bool:
        return bool(look_at(self._process.pid, Index([raw("secret", secret)])).found)

    def end(self) -> None:
        self._process.kill()
        self._process.wait()

    def _heard(self) -> None:
        assert self._process.stdout
        assert self._process.stdout.readline()


@pytest.fixture
def child() -> Iterator[Callable[[int | None], Child]]:
    children: list[Child] = []

    def make(library: int | None, *, tensors: bool = False) -> Child:
        children.append(Child(library, tensors=tensors))
        return children[-1]

    yield make
    for made in children:
        made.end()


@pytest.fixture(scope="module")
def tensors(library: int) -> Iterator[Child]:
    """One that makes tensors, for the tests that need no memory of its own: loading torch takes seconds."""
    made = Child(library, tensors=True)
    yield made
    made.end()


def secret_of(size: int) -> bytes:
    """No more than a pipe takes in one piece."""
    return np.random.default_rng(size).bytes(min(size, 50_000))


@looking
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_what_is_freed_is_overwritten(child: Callable[..., Child], library: int, size: int) -> None:
    secret = secret_of(size)
    for descriptor in (None, library):
        of_this = child(descriptor)
        of_this.do(f"at = put({len(secret)})", secret)
        assert of_this.holds(secret)
        copies = f"[ctypes.c_void_p(libc.malloc({size})) for _ in range(20)]"  # some may be used again
        of_this.do(f"copies = {copies}; [ctypes.memmove(copy, at, {len(secret)}) for copy in copies]")
        of_this.do("libc.free(at); [libc.free(copy) for copy in copies]; take_cached()()")
        assert of_this.holds(secret) is (descriptor is None)


@looking
@pytest.mark.parametrize("to", [64, 900_000], ids=["smaller", "larger"])
def test_what_a_block_leaves_behind_when_it_changes_its_size_is_overwritten(
    child: Callable[..., Child], library: int, to: int
) -> None:
    """What it takes along is whole. Its neighbour keeps it from growing where it is."""
    secret = secret_of(40_000)
    of_this = child(library)
    of_this.do("at = put(40_000); beside = libc.malloc(64)", secret)
    of_this.do(f"at = libc.realloc(at, {to}); kept = ctypes.string_at(at, min({to}, 40_000))")
    kept = secret[: min(to, 40_000)]
    assert of_this.holds(kept)
    of_this.do(f"del kept; ctypes.memset(at, 0, {to})")
    assert not of_this.holds(secret)


@looking
def test_a_tensor_gives_its_memory_to_the_next_of_its_size_and_to_nothing_else(tensors: Child) -> None:
    secret, of_this = secret_of(40_000), tensors
    of_this.do("held = torch.empty(100_000); at = held.data_ptr()")
    for _ in range(2):
        view = "(ctypes.c_char * 40_000).from_address(at + 200_000)"
        of_this.do(f"sys.stdin.buffer.raw.readinto({view})", secret)
        of_this.do("del held")
        assert of_this.holds(secret)  # until it is used again, or told to overwrite
        of_this.do("blocks = [libc.malloc(400_000) for _ in range(8)]")
        of_this.do("assert not any(block - 400_000 < at < block + 400_000 for block in blocks)")
        of_this.do("other = torch.empty(90_000); assert other.data_ptr() != at")
        of_this.do("held = torch.empty(100_000); assert held.data_ptr() == at")
        of_this.do("del held; take_cached()()")
        assert not of_this.holds(secret)
        of_this.do("held = torch.empty(100_000); at = held.data_ptr()")


# Where it stands in the steps by which kept blocks are ordered, and with pages of its own (from 32 MiB on).
@pytest.mark.parametrize("size", [65_536, 131_068, 131_072, 10 << 20, 51 << 20, 200 << 20])
def test_tensors_of_every_size_are_used_again(tensors: Child, size: int) -> None:
    tensors.do(f"held = torch.empty({size}, dtype=torch.uint8); at = held.data_ptr(); del held")
    tensors.do(f"held = torch.empty({size}, dtype=torch.uint8); assert held.data_ptr() == at; del held")


@pytest.mark.parametrize(("first", "then", "again"), [(29_000, 30_500, True), (29_000, 34_000, False)])
def test_a_pass_of_about_as_many_rows_uses_the_blocks_of_the_one_before(
    tensors: Child, first: int, then: int, *, again: bool
) -> None:
    """With exact sizes it found none, and 20 steps of an update filled the whole cache."""
    tensors.do(f"held = torch.empty({first}); at = held.data_ptr(); del held")
    tensors.do(f"held = torch.empty({then}); assert (held.data_ptr() == at) is {again}; del held")


@looking
def test_what_a_kept_block_has_beyond_the_next_tensor_is_overwritten(tensors: Child) -> None:
    """Up to an eighth of it: nobody would write there."""
    secret = secret_of(4000)
    tensors.do("held = torch.empty(1_004_000, dtype=torch.uint8); at = held.data_ptr()")
    tensors.do("sys.stdin.buffer.raw.readinto((ctypes.c_char * 4000).from_address(at + 1_000_000))", secret)
    tensors.do("del held; held = torch.empty(1_000_000, dtype=torch.uint8); assert held.data_ptr() == at")
    assert not tensors.holds(secret)


@pytest.mark.slow
def test_no_more_than_a_gibibyte_is_kept(tensors: Child) -> None:
    resident = "int(open('/proc/self/statm').read().split()[1]) * 4096"
    tensors.do(f"take_cached()(); before = {resident}")
    tensors.do("held = [torch.full((10_000_000 + n * 100_000,), 1.0) for n in range(50)]")  # 2.5 GB
    tensors.do("del held")
    tensors.do(f"assert {resident} - before < 1.4e9, 'more is kept'")
    tensors.do(f"take_cached()(); assert {resident} - before < 0.4e9, 'it is not given back'")


def test_free_memory_in_the_heap_goes_back_when_it_is_told_to(tensors: Child) -> None:
    resident = "int(open('/proc/self/statm').read().split()[1]) * 4096"
    tensors.do("held = [torch.full((2_000_000,), 1.0) for _ in range(25)]")  # 200 MB, which the heap retains
    tensors.do(f"del held; take_cached()(); before = {resident}")
    tensors.do(f"return_free_memory(); assert before - {resident} > 1e8")


def test_large_memory_that_was_never_touched_does_not_come_in_to_be_overwritten(
    child: Callable[..., Child], library: int
) -> None:
    of_this = child(library)
    of_this.do("import resource; most = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss")
    of_this.do("before = most(); at = libc.malloc(2 << 30); libc.free(at); assert most() - before < 1e5")
    of_this.do("at = libc.malloc(2 << 30); at = libc.realloc(at, 100); assert most() - before < 1e5")


def test_a_search_among_many_kept_blocks_is_short(tensors: Child) -> None:
    """Of texts, by chance or by a hostile caller's choice, in the same list; all threads wait for it."""
    tensors.do("import time; blocks = lambda: [torch.empty(69_000, dtype=torch.uint8) for _ in range(2000)]")
    for kept in ("few", "many"):  # seconds of this thread, whatever else the machine does
        tensors.do(f"begun = time.thread_time(); {kept}_held = blocks(); {kept} = time.thread_time() - begun")
        tensors.do(
            "held = [torch.empty(66_100 + n % 800, dtype=torch.uint8) for n in range(12_000)]; del held"
        )
    tensors.do("assert many < 30 * few, (many, few)")  # 320 times as long with all of them looked at


MANY = """
import random, threading
import torch
from perfit_cloud.hardening.allocator import take_cached
faults = []
def work(seed):
    rng, mine = random.Random(seed), {}
    try:
        for turn in range(1500):
            key = rng.randrange(12)
            if key in mine:
                made, value = mine.pop(key)
                if isinstance(made, torch.Tensor):
                    assert (made == value).all()
                else:
                    assert made == bytes([value]) * len(made)
            size = rng.choice([40, 700, 5000, 70_000, 70_016, 300_000, 2_000_000])
            value = rng.randrange(1, 250)
            if rng.random() < 0.6:
                mine[key] = torch.full((size // 4,), value, dtype=torch.int32), value
            else:
                grown = bytearray()  # by realloc
                for _ in range(4):
                    grown += bytes([value]) * (size // 4)
                mine[key] = bytes(grown), value
            if turn % 500 == 7:
                take_cached()()
    except BaseException as fault:
        faults.append(repr(fault))
threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(faults)
"""

FORKS = """
import ctypes, os, signal, threading
memory, held, statuses = ctypes.PyDLL(None), ctypes.CDLL(None), []
held.perfit_take_cached.restype = ctypes.c_void_p
memory.free.argtypes = [ctypes.c_void_p]
going = True
def hold():  # the lock, nearly always, and not Python's
    while going:
        assert not held.perfit_take_cached()
thread = threading.Thread(target=hold)
thread.start()
for _ in range(100):
    if not (forked := os.fork()):
        signal.alarm(60)
        made = ctypes.c_void_p()
        failed = memory.posix_memalign(ctypes.byref(made), 64, 1_000_000)
        memory.free(made)
        os._exit(failed)
    statuses.append(os.waitpid(forked, 0)[1])
    if statuses[-1]:
        break
going = False
thread.join()
print([status for status in statuses if status])
"""


def run_in(library: int, script: str) -> None:
    """In a process of its own, whose last line is what went wrong."""
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", script],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        pass_fds=(library,),
        env=process_hardening._environment(os.environ, library) | {"OMP_NUM_THREADS": "1"},
    )
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr[-2000:]


@pytest.mark.slow
def test_threads_that_free_and_overwrite_at_once_find_their_own_whole(library: int) -> None:
    run_in(library, MANY)


def test_a_child_of_fork_does_not_wait_for_a_lock_that_another_thread_had(library: int) -> None:
    """By our functions alone: PyTorch's own locks are not freed for a child."""
    run_in(library, FORKS)


@pytest.mark.parametrize("compiler", ["/nowhere/cc", "false", "true", "", "'"])
def test_without_a_compiler_there_is_none(monkeypatch: pytest.MonkeyPatch, compiler: str) -> None:
    monkeypatch.setenv("CC", compiler)
    assert allocator.build(os.environ) is None


OTHER = """
#include <stddef.h>
#include <string.h>
static char room[1 << 28]; static size_t used;
void *malloc(size_t n) {
    size_t *at = (size_t *)(room + used);
    used += (n + 31) & ~15ul;
    return at + 2;
}
void free(void *p) { (void)p; }
void *calloc(size_t n, size_t m) { return malloc(n * m); }
void *realloc(void *p, size_t n) { void *q = malloc(n); if (p) memcpy(q, p, n); return q; }
"""


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("theirs", ["another allocator", "something else"])
def test_it_does_not_stand_beside_another_allocator(tmp_path: Path, theirs: str) -> None:
    """glibc would be asked to free what it never gave. What else is preloaded stays."""
    code, preloaded = tmp_path / "theirs.c", tmp_path / "theirs.so"
    code.write_text(OTHER if theirs == "another allocator" else "int nothing;")
    command = ["cc", "-fno-builtin", "-shared", "-fPIC", "-o", str(preloaded), str(code)]
    subprocess.run(command, check=True, timeout=60)
    environment = {**os.environ, "LD_PRELOAD": str(preloaded)}
    subprocess.run([sys.executable, "-c", "pass"], env=environment, timeout=60, check=True)  # without ours
    held = allocator.build(environment)
    assert (held is None) is (theirs == "another allocator")
    if held is not None:
        assert allocator.preloading(held, environment) == f"/proc/self/fd/{held}:{preloaded}"
        os.close(held)


def test_where_there_are_no_files_in_memory_or_folders_to_write_to_there_is_none(
    monkeypatch: pytest.MonkeyPatch, library: int, tmp_path: Path
) -> None:
    """As in containers; the server starts without."""
    with monkeypatch.context() as patch:
        patch.delattr(os, "memfd_create")  # some builds of Python lack it
        assert allocator.build(os.environ) is None
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nowhere"))
    assert allocator.build(os.environ) is None


@pytest.mark.usefixtures("library")
def test_nothing_of_it_stays_on_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    held = allocator.build(os.environ)
    assert held is not None
    os.close(held)
    assert not list(tmp_path.iterdir())
