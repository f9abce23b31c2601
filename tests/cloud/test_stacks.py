"""What kernels leave on stacks: canaries as deep, in every kind of thread, looked for from outside."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from tests.support.memory import looking

from perfit_cloud.audit.memory import look_at
from perfit_cloud.audit.needles import raw
from perfit_cloud.audit.search import Index
from perfit_cloud.hardening import allocator
from perfit_cloud.hardening import process as process_hardening
from perfit_cloud.model.artefacts import Artefact
from perfit_cloud.model.base import BaseModel

PARTS = ("library", "ctypes", "nothing")  # what overwrites: stacks.c; without a compiler; not told to
DEPTH = 200 << 10  # bytes
POOL = """
import ctypes, importlib.util, pathlib, sys, threading
from perfit_cloud.hardening.allocator import take_cached
from perfit_cloud.hardening.stacks import DeadStacks

program = ctypes.CDLL(None)
torch = pathlib.Path(importlib.util.find_spec("torch").origin)  # not all of it, which takes its time
ctypes.CDLL(str(next(torch.with_name("lib").glob("libgomp*"))), ctypes.RTLD_GLOBAL)

def in_thread(do):
    thread = threading.Thread(target=do)
    thread.start()
    thread.join()
"""
# Reads secrets, puts copies of them on the stacks of threads, and lets itself be looked at.
BEGIN = (
    POOL
    + """
Region = ctypes.CFUNCTYPE(None, ctypes.c_void_p)

class Argument(ctypes.Structure):
    _fields_ = [("bytes", ctypes.c_char * int(sys.argv[1]))]

secrets = {name: Argument() for name in sys.argv[2].split(",")}
for secret in secrets.values():
    assert sys.stdin.buffer.readinto(secret) == ctypes.sizeof(secret)

def leave(name="secret"):
    program.getpid(secrets[name])

def in_pool(threads, do):
    program.GOMP_parallel(Region(lambda _: do()), None, threads, 0)

def show():
    for secret in secrets.values():
        ctypes.memset(ctypes.byref(secret), 0, ctypes.sizeof(secret))
    take_cached()()  # copies on their way to the stack
    print("ready", flush=True)
    sys.stdin.read()
"""
)
THREADS = (
    BEGIN
    + """
kind, is_told = sys.argv[3], "nothing" not in sys.argv
stacks, is_done = DeadStacks(3), threading.Event()

def work():
    if kind == "thread":
        leave()
    elif kind == "pool":
        in_pool(3, leave)
    elif kind == "pool that became smaller":
        in_pool(5, leave)
        in_pool(3, lambda: None)
    elif kind == "thread that ended":
        in_thread(leave)
    if is_told:
        stacks.overwrite_all()
    is_done.set()
    threading.Event().wait()

threading.Thread(target=work, daemon=True).start()
is_done.wait()
if is_told:
    stacks.overwrite_ended()
show()
"""
)


@pytest.fixture(scope="module")
def library() -> Iterator[int]:
    if shutil.which("cc") is None:
        pytest.skip("overwriting all stacks needs a C compiler")
    held = allocator.build(os.environ)
    assert held is not None
    yield held
    os.close(held)


def left_by(code: str, *words: str, names: Sequence[str] = ("secret",), library: int | None) -> set[str]:
    """Names of the secrets of which anything is there when the program is ready."""
    secrets = {name: np.random.default_rng(number).bytes(DEPTH) for number, name in enumerate(names)}
    with subprocess.Popen(
        [sys.executable, "-c", code, str(DEPTH), ",".join(names), *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        pass_fds=() if library is None else (library,),
        env=process_hardening._environment(os.environ, library) | {"OMP_WAIT_POLICY": "passive"},
    ) as process:
        assert process.stdin and process.stdout
        process.stdin.write(b"".join(secrets.values()))
        process.stdin.flush()
        assert process.stdout.readline() == b"ready\n"
        look = look_at(process.pid, Index([raw(*of_one) for of_one in secrets.items()]))
        process.kill()
    return {names[found.needle] for found in look.found}


def said(code: str, library: int, by: str, *, through: Sequence[str] = ()) -> str:
    held = library if by == "library" else None
    done = subprocess.run(
        [*through, sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        pass_fds=() if held is None else (held,),
        env=process_hardening._environment(os.environ, held),
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


@looking
@pytest.mark.parametrize("kind", ["thread", "pool", "pool that became smaller", "thread that ended"])
@pytest.mark.parametrize("by", PARTS)
def test_what_kernels_leave_on_stacks_is_overwritten(library: int, by: str, kind: str) -> None:
    """Of threads that ended the C library keeps some, for others."""
    found = left_by(THREADS, kind, by, library=library if by == "library" else None)
    assert bool(found) is (by == "nothing" or (by == "ctypes" and "pool" in kind))


ENGINES = (
    BEGIN
    + """
import torch
torch.set_num_threads(2)
from perfit_cloud.engine.gradients.session import UpdateEngine, GradientRequest
from perfit_cloud.engine.gradients.stateless import GradientEngine
from perfit_cloud.engine.interface import GenerationSettings
from perfit_cloud.engine.generation.factory import build_engine
from perfit_cloud.engine.gradients.scheduler import GradientScheduler
from perfit_cloud.engine.device_lock import DeviceLock
from perfit_shared.types import Mode, Sampling
from perfit_cloud.engine.interface import ShiftUse
from perfit_cloud.model.artefacts import Artefact
from perfit_cloud.model.base import load_base
from perfit_cloud.hardening.scrubber import MemoryScrubber

base, artefact, device_lock = load_base(sys.argv[3]), Artefact.load(pathlib.Path(sys.argv[4])), DeviceLock()
scrubber = MemoryScrubber(base.devices, device_lock)
if "nothing" not in sys.argv:
    scrubber.start()

def multiply(module, _given, output):
    # As deep as a kernel, in every thread of the pass, forward and backward.
    name = threading.current_thread().name
    if type(module).__name__.endswith("MLP") and name in secrets:
        in_pool(2, lambda: leave(name))
        if output.requires_grad:
            output.register_hook(lambda _: in_pool(2, lambda: leave(name)))

torch.nn.modules.module.register_module_forward_hook(multiply)
use, pairs = ShiftUse(Mode.PERSONAL, artefact, artefact.seed), [([3, 4, 5, 6], [7, 8])] * 2

def in_waiting_thread(name, do):
    is_done = threading.Event()
    def work():
        do()
        is_done.set()
        threading.Event().wait()
    threading.Thread(target=work, name=name, daemon=True).start()
    is_done.wait()

def handle():
    leave("call")  # as a codec might, outside of any turn
    scrubber.call_ended()

generation = build_engine(base, {artefact.name: artefact}, GenerationSettings(cache_tokens=512), device_lock)
list(generation.submit([3, 4, 5, 6], use, Sampling(max_new_tokens=2)))
steps = GradientScheduler(UpdateEngine(base, keep_bytes=2**24, device_lock=device_lock))
with steps.open(pairs, artefact) as session:
    steps.submit(GradientRequest(session, range(2), artefact.seed)).result()
in_waiting_thread("gradient", lambda: GradientEngine(base, device_lock).gradient(pairs, use))
in_waiting_thread("call", handle)
show()
"""
)
ALL = ("perfit-generation", "perfit-steps", "MainThread", "gradient", "call")


@looking
@pytest.mark.slow
@pytest.mark.parametrize("by", ["library", "nothing"])
def test_every_thread_that_computes_overwrites_what_it_left(
    library: int,
    model_folder: Callable[[str], Path],
    base: BaseModel,
    artefact: Artefact,
    tmp_path: Path,
    by: str,
) -> None:
    """The engines' own, those of calls, and torch's for each of them; after answers, gradients and steps."""
    artefact.save(tmp_path)
    found = left_by(ENGINES, str(model_folder("llama")), str(tmp_path), by, names=ALL, library=library)
    assert found == (set() if by == "library" else set(ALL))


@pytest.mark.parametrize(("by", "told"), [("library", "[True, True]"), ("ctypes", "[True, False]")])
def test_whether_stacks_are_overwritten_is_tried(library: int, by: str, told: str) -> None:
    """Without a compiler the threads that torch computes with are not reached."""
    assert said(f"{POOL}print([DeadStacks(1).overwrites(), DeadStacks(3).overwrites()])", library, by) == told


def test_where_stacks_are_small_no_large_argument_is_put_on_them(library: int) -> None:
    code = f"{POOL}in_thread(DeadStacks(1).overwrite); print(DeadStacks(1).overwrites())"
    through = ("sh", "-c", 'ulimit -Ss 512; exec "$@"', "sh")
    assert said(code, library, "ctypes", through=through) == "False"


def test_what_is_alive_on_a_stack_stays(library: int) -> None:
    """Overwritten again and again below functions that are at work: a sort, and a pool."""
    code = f"""{POOL}
import random
program = ctypes.CDLL(None)
Compare = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_int), ctypes.POINTER(ctypes.c_int))
stacks = DeadStacks(2)

def compare(one, other):
    stacks.overwrite()
    return one[0] - other[0]

def work(seed):
    given = random.Random(seed).sample(range(10_000), 400)
    array = (ctypes.c_int * 400)(*given)
    program.qsort(array, 400, 4, Compare(compare))
    stacks.overwrite_all()
    assert list(array) == sorted(given)
    done.append(seed)

done = []
threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
work(4)  # of the main thread, whose stack still grows
print(sorted(done))
"""
    assert said(code, library, "library") == "[0, 1, 2, 3, 4]"


REGISTERS = r"""
void perfit_overwrite_stack(void);
#define ALL ".irp n,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31\n"
void around(const char *given, char *found) {
    __asm__ volatile(ALL "vmovdqu64 64*\\n(%0), %%zmm\\n\n.endr" : : "r"(given) : "memory");
    perfit_overwrite_stack();
    __asm__ volatile(ALL "vmovdqu64 %%zmm\\n, 64*\\n(%0)\n.endr" : : "r"(found) : "memory");
}
"""


@pytest.mark.skipif(
    "avx512f" not in Path("/proc/cpuinfo").read_text("ascii"), reason="these registers are of AVX-512"
)
def test_nothing_is_left_in_registers(library: int, tmp_path: Path) -> None:
    """The next signal would save them on the stack."""
    built = tmp_path / "registers.so"
    subprocess.run(
        ["cc", "-shared", "-fPIC", "-x", "c", "-o", str(built), "-"], input=REGISTERS, text=True, check=True
    )
    code = f"""{POOL}
found = (ctypes.c_char * 2048)()
ctypes.CDLL({str(built)!r}).around(b"secret!!" * 256, found)
print(bytes(found).count(0), b"secret" in bytes(found))
"""
    assert said(code, library, "library") == "2048 False"
