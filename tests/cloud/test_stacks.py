"""What kernels leave on stacks: canaries as deep as theirs, in every kind of thread, looked for from outside."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from tests.cloud.test_audit_memory import looking

from perfit_cloud.audit.memory import look_at
from perfit_cloud.audit.needles import raw
from perfit_cloud.audit.search import Index
from perfit_cloud.model.artefacts import Artefact
from perfit_cloud.model.base import BaseModel
from perfit_cloud.service import freeing, hygiene

PARTS = ("library", "ctypes", "nothing")  # what overwrites: stacks.c; without a compiler; not told to
DEPTH = 200 << 10  # bytes
# Reads a secret, puts a copy of it on the stack of a thread, and lets itself be looked at.
BEGIN = """
import ctypes, importlib.util, pathlib, sys, threading
from perfit_cloud.service.freeing import take_kept
from perfit_cloud.service.stacks import DeadStacks

program = ctypes.CDLL(None)
Region = ctypes.CFUNCTYPE(None, ctypes.c_void_p)

class Argument(ctypes.Structure):
    _fields_ = [("bytes", ctypes.c_char * int(sys.argv[1]))]

secret = Argument()
assert sys.stdin.buffer.readinto(secret) == ctypes.sizeof(secret)

def leave():
    program.getpid(secret)

def in_pool(threads, do):
    program.GOMP_parallel(Region(lambda _: do()), None, threads, 0)

def in_thread(do):
    thread = threading.Thread(target=do)
    thread.start()
    thread.join()

def show():
    ctypes.memset(ctypes.byref(secret), 0, ctypes.sizeof(secret))
    take_kept()()  # copies on their way to the stack
    print("ready", flush=True)
    sys.stdin.read()
"""
THREADS = (
    BEGIN
    + """
torch = pathlib.Path(importlib.util.find_spec("torch").origin)  # not all of it, which takes its time
ctypes.CDLL(str(next(torch.with_name("lib").glob("libgomp*"))), ctypes.RTLD_GLOBAL)
kind, is_told = sys.argv[2], "nothing" not in sys.argv
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
    stacks.sweep()
show()
"""
)


@pytest.fixture(scope="module")
def library() -> Iterator[int]:
    if shutil.which("cc") is None:
        pytest.skip("overwriting all stacks needs a C compiler")
    held = freeing.build(os.environ)
    assert held is not None
    yield held
    os.close(held)


def left_by(code: str, *words: str, size: int, library: int | None) -> set[str]:
    """Where a secret of so many bytes lies when the program is ready."""
    secret = np.random.default_rng(size).bytes(size)
    with subprocess.Popen(
        [sys.executable, "-c", code, str(size), *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        pass_fds=() if library is None else (library,), env=hygiene._environment(os.environ, library),
    ) as process:  # fmt: skip
        assert process.stdin and process.stdout
        process.stdin.write(secret)
        process.stdin.flush()
        assert process.stdout.readline() == b"ready\n"
        look = look_at(process.pid, Index([raw("secret", secret)]))
        process.kill()
    return {found.where for found in look.found}


@looking
@pytest.mark.parametrize("kind", ["thread", "pool", "pool that became smaller", "thread that ended"])
@pytest.mark.parametrize("by", PARTS)
def test_what_kernels_leave_on_stacks_is_overwritten(library: int, by: str, kind: str) -> None:
    """Of threads that ended the C library keeps some, for others."""
    found = left_by(THREADS, kind, by, size=DEPTH, library=library if by == "library" else None)
    stays = by == "nothing" or (by == "ctypes" and "pool" in kind)
    assert bool(found) is stays
