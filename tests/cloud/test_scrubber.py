"""What the scrubber takes away after a call: cycles, and what numpy, MKL and CUDA cache of freed memory."""

from __future__ import annotations

import ctypes
import gc
import os
import shutil
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.support.cloud import TIMEOUT, Running, generate
from tests.support.memory import looking
from tests.support.waiting import wait_for

from perfit_cloud.audit.memory import look_at
from perfit_cloud.audit.needles import raw
from perfit_cloud.audit.search import Index
from perfit_cloud.engine.device_lock import DeviceLock
from perfit_cloud.hardening import process as process_hardening
from perfit_cloud.hardening.allocator import build
from perfit_cloud.hardening.scrubber import MemoryScrubber, overwrite_small_arrays

AS_ON_INTEL = Path(__file__).parents[2] / "scripts" / "soak" / "as_on_intel.c"


def test_memory_of_small_arrays_is_overwritten() -> None:
    """numpy keeps it to itself: the allocator, which overwrites what is freed, never hears of it."""
    arrays = [np.full(n, 3.25, np.float32) for n in (4, 32, 100, 255) for _ in range(7)]
    places = [(a.ctypes.data, a.nbytes) for a in arrays]
    needle = np.full(4, 3.25, np.float32).tobytes()
    arrays.clear()
    assert any(needle in ctypes.string_at(*place) for place in places)  # numpy still does
    overwrite_small_arrays()
    assert not any(needle in ctypes.string_at(*place) for place in places)


# A program that is given numbers and multiplies them, and a scrub.
MULTIPLIED = """
import sys
import numpy as np
import torch
from perfit_cloud.engine.device_lock import DeviceLock
from perfit_cloud.hardening.scrubber import MemoryScrubber
from perfit_shared.rotations import off_orthonormal

def pause(word):
    print(word, flush=True)
    sys.stdin.readline()

torch.set_num_threads(1)
numbers = np.frombuffer(sys.stdin.buffer.read(int(sys.argv[1])), np.float32).reshape(32, -1).copy()
scrubber = MemoryScrubber([torch.device("cpu")], DeviceLock())
scrubber.start()
if "bfloat16" in sys.argv:
    half = torch.from_numpy(numbers).bfloat16()
    torch.ones(200, 32, dtype=torch.bfloat16) @ half
    torch.ones(200, half.shape[1], dtype=torch.bfloat16) @ half.T
    del half
else:
    torch.ones(200, numbers.shape[1]) @ torch.from_numpy(numbers).T
if "overwritten" in sys.argv:
    off_orthonormal(numbers.astype(np.float64))
elif "as it comes" in sys.argv:
    numbers.astype(np.float64) @ numbers.astype(np.float64).T
del numbers
pause("multiplied")
scrubber.scrub()
pause("scrubbed")
"""
NUMBERS = np.random.default_rng(3).standard_normal((32, 1024)).astype(np.float32)


def found_around_a_scrub(how: str, forms: Mapping[str, bytes], given: Mapping[str, str]) -> list[set[str]]:
    """Which forms of the numbers lie anywhere in the program, before the scrub and after it."""
    index, library = Index([raw(*form) for form in forms.items()]), build(given)  # none without a compiler
    found = []
    with subprocess.Popen(
        [sys.executable, "-c", MULTIPLIED, str(NUMBERS.nbytes), how],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        bufsize=0,
        env=process_hardening._environment(given, library),
        pass_fds=[] if library is None else [library],
    ) as child:
        assert child.stdin is not None and child.stdout is not None
        child.stdin.write(NUMBERS.tobytes())
        for moment in (b"multiplied\n", b"scrubbed\n"):
            assert child.stdout.readline() == moment
            found.append({index.needles[of.needle].kind for of in look_at(child.pid, index).found})
            child.stdin.write(b"\n")
        child.kill()
    return found


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, str]]:
    """The environment in which MKL takes "its own" kernels for this processor, or "Intel's"."""

    def environment(which: str) -> dict[str, str]:
        if which == "its own":
            return dict(os.environ)
        if shutil.which("cc") is None:
            pytest.skip("to have Intel's kernels on another processor needs a C compiler")
        built = tmp_path_factory.mktemp("intel") / "as_on_intel.so"
        subprocess.run(["cc", "-shared", "-fPIC", "-o", str(built), str(AS_ON_INTEL)], check=True)
        return {**os.environ, "LD_PRELOAD": str(built)}

    return environment


@looking
@pytest.mark.parametrize(
    ("how", "which"),
    [
        ("overwritten", "its own"),
        pytest.param("as it comes", "its own", marks=pytest.mark.slow),
        pytest.param("overwritten", "Intel's", marks=pytest.mark.slow),
        pytest.param("as it comes", "Intel's", marks=pytest.mark.slow),
    ],
)
def test_what_matrices_are_copied_to_is_overwritten(
    kernels: Callable[[str], dict[str, str]], how: str, which: str
) -> None:
    """MKL (torch) and OpenBLAS (numpy) both kept copies of tensors in memory that they never free.

    Of Intel's kernels those with AVX-512 keep them on the stack, too.
    """
    forms = {
        f"{form.dtype} {order}": form.tobytes(order)  # as they are, and transposed
        for form in (NUMBERS, NUMBERS.astype(np.float64))
        for order in ("C", "F")
    }
    before, after = found_around_a_scrub(how, forms, kernels(which))
    left = set() if how == "overwritten" else {"float64"}
    assert {form.split()[0] for form in before} >= {"float32", *left}
    assert {form.split()[0] for form in after} == left


@looking
@pytest.mark.slow
def test_what_matrices_in_bfloat16_are_packed_to_is_overwritten() -> None:
    """Kernels of oneDNN for this dtype want two numbers of a column side by side."""
    half = torch.from_numpy(NUMBERS).bfloat16().view(torch.int16).numpy()
    pairs = half.reshape(16, 2, 1024).transpose(0, 2, 1), half.T.reshape(512, 2, 32).transpose(0, 2, 1)
    forms = {
        f"{name} {order}": form.tobytes(order)
        for name, form in (("as they are", half), ("pairs of rows", pairs[0]), ("pairs of columns", pairs[1]))
        for order in ("C", "F")
    }
    before, after = found_around_a_scrub("bfloat16", forms, os.environ)
    assert before
    assert not after


def test_free_memory_of_a_cuda_device_is_overwritten_largest_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as can be told without one: the blocks it asks for, in which order, and what it does to them."""
    taken: list[torch.Tensor] = []

    def empty(size: int, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        assert str(device) == "cuda:1"
        taken.append(torch.ones(size, dtype=dtype))
        return taken[-1]

    def segment(device: int, kind: str, *blocks: tuple[int, str]) -> dict[str, Any]:
        shown = [{"size": size, "state": state} for size, state in blocks]
        return {"device": device, "segment_type": kind, "blocks": shown}

    mib = 1 << 20
    segments = [
        segment(1, "small", (512, "inactive"), (1024, "active_allocated")),
        segment(0, "small", (64, "inactive")),
        segment(1, "large", (5 * mib, "inactive"), (mib + 512, "inactive")),
        segment(1, "large", (20 * mib, "active_allocated")),
        # Asked for whole, it would come from a segment for large things, and this one be left.
        segment(1, "small", (2 * mib - 512, "inactive"), (512, "active_allocated")),
    ]
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: segments)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    monkeypatch.setattr(torch, "empty", empty)
    MemoryScrubber([torch.device("cuda:1")], DeviceLock()).scrub()
    assert [len(block) for block in taken] == [5 * mib, mib + 512, mib, mib - 512, 512]
    assert not any(block.any() for block in taken)


def test_a_scrub_is_no_pass_of_answers() -> None:
    """Four idle turns a second stood among the passes that an operator is told of."""
    device_lock, kinds = DeviceLock(), []
    device_lock.on_pass = lambda kind, _seconds: kinds.append(kind)
    MemoryScrubber([torch.device("cpu")], device_lock).scrub()
    assert kinds == ["sweep"]


@pytest.mark.slow
@pytest.mark.parametrize("is_hardened", [True, False])
def test_whether_tensors_are_overwritten_is_tried(is_hardened: bool) -> None:
    """A build of torch with an allocator of its own would not show otherwise."""
    code = (
        "import torch; from perfit_cloud.engine.device_lock import DeviceLock; "
        "from perfit_cloud.hardening.scrubber import MemoryScrubber; "
        "print(MemoryScrubber([torch.device('cpu')], DeviceLock()).overwrites_tensors())"
    )
    library = build(os.environ)  # none where there is no compiler: glibc overwrites then
    environment = process_hardening._environment(os.environ, library if is_hardened else None)
    if not is_hardened:
        del environment["MALLOC_PERTURB_"]
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        timeout=280,
        env=environment,
        pass_fds=[] if library is None else [library],
    )
    assert done.stdout == f"{is_hardened}\n"


class Knot:
    def __init__(self) -> None:
        self.itself = self


def test_what_keeps_itself_is_scrubbed_after_a_call() -> None:
    scrubber = MemoryScrubber([torch.device("cpu")], DeviceLock())
    gc.disable()
    try:
        scrubber.start()
        for _ in range(2):
            gone = weakref.ref(Knot())
            assert gone() is not None
            scrubber.call_ended()
            wait_for(lambda gone=gone: gone() is None)
    finally:
        gc.enable()
        scrubber.close()
        gc.unfreeze()


class Calls(threading.Event):
    """Set when a call ends, which one does every `step` seconds up to `last`, by a clock of its own."""

    def __init__(self, *, step: float, last: float) -> None:
        super().__init__()
        self.now, self.over = 0.0, threading.Event()  # nothing more will come
        self._ends = iter(np.arange(step, last + step / 2, step).tolist())
        self._next: float | None = next(self._ends)

    def wait(self, timeout: float | None = None) -> bool:
        if self.is_set():
            return True
        if self._next is not None and (timeout is None or self._next <= self.now + timeout):
            self.now, self._next = max(self.now, self._next), next(self._ends, None)
            return True
        if timeout is None:
            self.over.set()
            return super().wait()  # for the scrubber's end
        self.now += timeout
        return False


def scrubs_for(calls: Calls, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """When there were any, by the calls' clock; that of the start is the first."""
    scrubbed: list[float] = []
    scrubber = MemoryScrubber([torch.device("cpu")], DeviceLock(), clock=lambda: calls.now, ended=calls)
    monkeypatch.setattr(scrubber, "scrub", lambda: scrubbed.append(calls.now))
    scrubber.start()
    try:
        assert calls.over.wait(TIMEOUT)
        return list(scrubbed)
    finally:
        scrubber.close()
        gc.unfreeze()


def test_calls_that_keep_ending_share_a_scrub_and_none_waits_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """A scrub for each took a tenth of a busy cloud's time."""
    scrubbed = np.array(scrubs_for(Calls(step=0.125, last=20.0), monkeypatch))
    while_ending = int((scrubbed < 20).sum())
    assert while_ending <= 1 + 20 / 2
    assert np.diff(scrubbed)[:while_ending].max() <= 2 + 0.125


def test_a_call_is_scrubbed_after_soon_and_twice_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """For threads of the call that end a little later."""
    assert scrubs_for(Calls(step=7.0, last=7.0), monkeypatch) == [0.0, 7.5, 8.5, 11.5]


def test_every_call_tells_the_scrubber(run: Callable[..., Running]) -> None:
    ended = threading.Semaphore(0)
    device = run(ended=ended.release).device()
    device.describe()
    assert ended.acquire(timeout=TIMEOUT)
    list(device.stub.Generate(generate(), timeout=TIMEOUT))
    assert ended.acquire(timeout=TIMEOUT)
