"""What is left of calls: how the process starts, what the sweeper takes away, and what nobody keeps."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from google.protobuf.message import Message
from tests.cloud.doubles import wait_for
from tests.cloud.serving import TIMEOUT, Device, Running, generate, personal
from tests.cloud.test_audit_memory import may_look
from tests.cloud.test_service_adapt import EXAMPLES, examples, mine, step
from tests.cloud.test_service_adapt import opening as adapt_opening
from tests.cloud.test_service_ask import opening as ask_opening
from tests.cloud.test_service_ask import question

from perfit_cloud.audit.memory import look_at
from perfit_cloud.audit.needles import raw
from perfit_cloud.audit.search import Index
from perfit_cloud.engine.adaptation import Adaptation, AdaptationEngine, Step
from perfit_cloud.engine.answers import Answer
from perfit_cloud.engine.generation import GenerationEngine
from perfit_cloud.engine.gradients import GradientEngine
from perfit_cloud.engine.kept import Kept
from perfit_cloud.engine.serving import Request
from perfit_cloud.engine.steps import StepQueue
from perfit_cloud.engine.turns import Turns
from perfit_cloud.engine.types import Gradient, Sampling, ShiftUse
from perfit_cloud.model.artefacts import Artefact
from perfit_cloud.service import hygiene
from perfit_cloud.service.sweeping import Sweeper, overwrite_small_arrays
from perfit_shared.shifts import ShiftTensors
from perfit_shared.wire import personalization_pb2 as pb

# -- how the process starts ----------------------------------------------------------------------

PROGRAM = """
import json, logging, os, sys
from dataclasses import asdict
from perfit_cloud.service.hygiene import harden, restart_hardened
logging.basicConfig(format="%(message)s")
print("started", file=sys.stderr)
if "restart" in sys.argv:
    restart_hardened()
held = asdict(harden())
core = [line.split()[4:6] for line in open("/proc/self/limits") if line.startswith("Max core")]
print(json.dumps({"held": held, "core": core, "tunables": os.environ.get("GLIBC_TUNABLES")}))
"""


def started(*words: str, through: tuple[str, ...] = (), **environment: str) -> tuple[dict[str, Any], str]:
    """What the program says of itself on stdout and stderr."""
    unset = {*hygiene._ENVIRONMENT, "GLIBC_TUNABLES", hygiene._RESTARTED}
    kept = {name: value for name, value in os.environ.items() if name not in unset}
    done = subprocess.run(
        [*through, sys.executable, "-c", PROGRAM, *words],
        capture_output=True, text=True, timeout=60, check=True, env=kept | environment,
    )  # fmt: skip
    return json.loads(done.stdout), done.stderr


def test_it_starts_once_more_and_then_overwrites_what_is_freed() -> None:
    told, errors = started("restart", GLIBC_TUNABLES="glibc.malloc.arena_max=3:glibc.malloc.tcache_count=9")
    assert told["held"]["overwrites_freed"]
    assert told["held"]["no_core_dumps"]
    assert told["held"]["not_dumpable"]
    assert told["core"] == [["0", "0"]]
    assert told["tunables"] == "glibc.malloc.arena_max=3:glibc.malloc.tcache_count=0"
    assert errors.count("started") == 2
    assert "stays in memory" not in errors


def test_what_does_not_hold_is_said() -> None:
    told, errors = started()
    assert not told["held"]["overwrites_freed"]
    assert errors.count("what is freed stays in memory") == 1


def test_a_program_that_is_not_given_its_settings_starts_once_more_only() -> None:
    """As the loader has it with one that has privileges of its own: it would have started for ever."""
    through = ("sh", "-c", 'PERFIT_RESTARTED=$$ exec "$@"', "sh")
    told, errors = started("restart", through=through)
    assert errors.count("started") == 1
    assert not told["held"]["overwrites_freed"]


@pytest.mark.parametrize(
    ("locked", "swap", "held"), [(True, True, True), (False, False, True), (False, True, False)]
)
def test_memory_that_may_reach_the_swap_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, locked: bool, swap: bool, held: bool
) -> None:
    for name, found in (
        ("_overwrites_freed", True), ("_forbids_core_dumps", True), ("_forbids_reading", True),
        ("_locks_memory", locked), ("_has_swap", swap),
    ):  # fmt: skip
        monkeypatch.setattr(hygiene, name, lambda found=found: found)
    assert hygiene.harden().no_swap is held
    assert caplog.text.count("may reach the swap") == (not held)


@pytest.mark.parametrize(
    ("limits", "capabilities", "users", "may"),
    [
        ((4096, -1), 0, "0 0 4294967295", True),  # the limit can be lifted
        ((4096, 8192), 1 << 14, "0 0 4294967295", True),
        ((4096, 8192), 0, "0 0 4294967295", False),  # later allocations would fail
        ((4096, 8192), 1 << 14, "0 1000 1", False),  # a capability of a user namespace lifts no limit
    ],
)
def test_memory_is_locked_only_where_no_limit_can_be_met(
    monkeypatch: pytest.MonkeyPatch, limits: tuple[int, int], capabilities: int, users: str, may: bool
) -> None:
    files = {"/proc/self/status": f"Name: x\nCapEff:\t{capabilities:016x}\n", "/proc/self/uid_map": users}
    monkeypatch.setattr(hygiene.Path, "read_text", lambda path, _: files[str(path)])
    monkeypatch.setattr(hygiene.resource, "getrlimit", lambda _: limits)
    monkeypatch.setattr(hygiene.resource, "setrlimit", lambda *_: None)
    assert hygiene._may_lock_all() is may


# -- the sweeper ---------------------------------------------------------------------------------


def test_memory_of_small_arrays_is_overwritten() -> None:
    """numpy keeps it to itself: the allocator, which overwrites what is freed, never hears of it."""
    arrays = [np.full(n, 3.25, np.float32) for n in (4, 32, 100, 255) for _ in range(7)]
    places = [(a.ctypes.data, a.nbytes) for a in arrays]
    needle = np.full(4, 3.25, np.float32).tobytes()
    arrays.clear()
    assert any(needle in ctypes.string_at(*place) for place in places)  # numpy still does
    overwrite_small_arrays()
    assert not any(needle in ctypes.string_at(*place) for place in places)


MULTIPLIED = """
import sys
import numpy as np
import torch
from perfit_cloud.engine.turns import Turns
from perfit_cloud.service.sweeping import Sweeper
from perfit_shared.shifts import _off_orthonormal

def pause(word):
    print(word, flush=True)
    sys.stdin.readline()

torch.set_num_threads(1)
numbers = np.frombuffer(sys.stdin.buffer.read(int(sys.argv[1])), np.float32).reshape(32, -1).copy()
sweeper = Sweeper(torch.device("cpu"), Turns())
torch.ones(200, numbers.shape[1]) @ torch.from_numpy(numbers).T
if "overwritten" in sys.argv:
    _off_orthonormal(numbers.astype(np.float64))
else:
    numbers.astype(np.float64) @ numbers.astype(np.float64).T
del numbers
pause("multiplied")
sweeper.sweep()
pause("swept")
"""


@pytest.mark.skipif(not may_look(), reason="looking into other processes needs CAP_SYS_PTRACE")
@pytest.mark.parametrize("how", ["as it comes", "overwritten"])
def test_buffers_that_matrices_are_copied_to_are_overwritten(how: str) -> None:
    """MKL (torch) and OpenBLAS (numpy) both kept copies of tensors in memory that they never free."""
    numbers = np.random.default_rng(3).standard_normal((32, 1024)).astype(np.float32)
    forms = [f(a) for f in (np.asarray, np.transpose) for a in (numbers, numbers.astype(np.float64))]
    needles = [raw(f"{form.dtype}", np.ascontiguousarray(form).tobytes()) for form in forms]
    index = Index(needles)

    def found() -> set[str]:
        return {needles[of.needle].kind for of in look_at(child.pid, index).found}

    with subprocess.Popen(
        [sys.executable, "-c", MULTIPLIED, str(numbers.nbytes), how], stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, env=os.environ | hygiene._environment(os.environ), bufsize=0,
    ) as child:  # fmt: skip
        assert child.stdin is not None and child.stdout is not None
        child.stdin.write(numbers.tobytes())
        assert child.stdout.readline() == b"multiplied\n"
        assert found() == ({"float32"} if how == "overwritten" else {"float32", "float64"})
        child.stdin.write(b"\n")
        assert child.stdout.readline() == b"swept\n"
        assert found() == (set() if how == "overwritten" else {"float64"})
        child.kill()


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
    Sweeper(torch.device("cuda:1"), Turns()).sweep()
    assert [len(block) for block in taken] == [5 * mib, mib + 512, mib, mib - 512, 512]
    assert not any(block.any() for block in taken)


def test_a_sweep_is_no_pass_of_answers() -> None:
    """Four idle turns a second stood among the passes that an operator is told of."""
    turns, kinds = Turns(), []
    turns.on_pass = lambda kind, _seconds: kinds.append(kind)
    Sweeper(torch.device("cpu"), turns).sweep()
    assert kinds == ["sweep"]


class Knot:
    def __init__(self) -> None:
        self.itself = self


def test_what_keeps_itself_is_swept_after_a_call() -> None:
    sweeper = Sweeper(torch.device("cpu"), Turns())
    gc.disable()
    try:
        sweeper.start()
        for _ in range(2):
            gone = weakref.ref(Knot())
            assert gone() is not None
            sweeper.soon()
            wait_for(lambda gone=gone: gone() is None)
    finally:
        gc.enable()
        sweeper.close()
        gc.unfreeze()


def test_every_call_tells_the_sweeper(run: Callable[..., Running]) -> None:
    ended = threading.Semaphore(0)
    device = run(ended=ended.release).device()
    device.describe()
    assert ended.acquire(timeout=TIMEOUT)
    list(device.stub.Generate(generate(), timeout=TIMEOUT))
    assert ended.acquire(timeout=TIMEOUT)


# -- what nobody keeps ---------------------------------------------------------------------------

PERSONAL = (Message, Request, Answer, ShiftUse, ShiftTensors, Sampling, Step, Adaptation, Kept, Gradient)


def left() -> list[str]:
    """What there is of a call, as types; memory for keys and values that is overwritten does not count."""
    gc.collect()
    found = []
    for each in gc.get_objects():  # without what was there before, which is frozen
        if isinstance(each, torch.Tensor):
            if not isinstance(each, torch.nn.Parameter) and bool((each != 0).any()):
                found.append(f"tensor {tuple(each.shape)}")
        elif isinstance(each, PERSONAL):
            found.append(type(each).__name__)
    return found


@pytest.fixture
def arrays(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[Any]]:
    """The arrays of all shifts that are decoded: the collector does not know of arrays."""
    seen: list[weakref.ref[Any]] = []
    decode = ShiftTensors.from_bytes

    def watched(*args: Any) -> ShiftTensors:
        tensors = decode(*args)
        seen.extend(weakref.ref(array) for _, array in tensors.named())
        return tensors

    monkeypatch.setattr(ShiftTensors, "from_bytes", staticmethod(watched))
    return seen


@pytest.fixture
def frozen() -> Iterator[None]:
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def test_the_look_finds_what_is_there(artefact: Artefact, frozen: None) -> None:
    """Otherwise the tests below would pass whatever is kept."""
    kept = [torch.ones(3), pb.Question(), ShiftUse, mine(artefact, 1)]
    assert sorted(left()) == ["Question", "ShiftTensors", "tensor (3,)"]
    del kept
    assert left() == []


def refused(call: Callable[[], object]) -> None:
    with pytest.raises(grpc.RpcError):
        call()


def generated(device: Device, artefact: Artefact) -> None:
    assert list(device.stub.Generate(generate(shift=personal(artefact)[0], stop=["zebra"]), timeout=TIMEOUT))


def generate_cancelled(device: Device, artefact: Artefact) -> None:
    call = device.stub.Generate(generate(shift=personal(artefact)[0], max_new_tokens=200), timeout=TIMEOUT)
    next(call)
    call.cancel()


def generate_refused(device: Device, artefact: Artefact) -> None:
    refused(lambda: list(device.stub.Generate(generate(shift=personal(artefact)[0], top_p=7))))


def generate_late(device: Device, artefact: Artefact) -> None:
    refused(lambda: list(device.stub.Generate(generate(shift=personal(artefact)[0]), timeout=0.5)))


def scored(device: Device, artefact: Artefact) -> None:
    candidates = [pb.Candidate(prompt=pb.Prompt(text=text), answer=answer) for text, answer in EXAMPLES]
    request = pb.ScoreRequest(candidates=candidates, shift=personal(artefact)[0])
    assert device.stub.Score(request, timeout=TIMEOUT).scores


def gradient_of(device: Device, artefact: Artefact) -> None:
    pairs = [pb.Example(prompt=pb.Prompt(text=text), target=target) for text, target in EXAMPLES]
    request = pb.ComputeGradientRequest(examples=pairs, shift=personal(artefact)[0])
    assert device.stub.ComputeGradient(request, timeout=TIMEOUT).gradient


def gradient_failed(device: Device, artefact: Artefact) -> None:
    refused(lambda: gradient_of(device, artefact))


def asked(device: Device, artefact: Artefact) -> None:
    requests = [ask_opening(personal(artefact)[0]), question(1), question(2, "the dog ran")]
    assert list(device.stub.Ask(iter(requests), timeout=TIMEOUT))


def ask_client_gone(device: Device, artefact: Artefact) -> None:
    go = threading.Event()

    def requests() -> Iterator[pb.AskRequest]:
        yield ask_opening(personal(artefact)[0])
        yield question(1, max_new_tokens=200)
        go.wait(TIMEOUT)

    call = device.stub.Ask(requests(), timeout=TIMEOUT)
    next(call)
    device.channel.close()
    go.set()


def ask_refused(device: Device, artefact: Artefact) -> None:
    requests = [ask_opening(personal(artefact)[0]), ask_opening(personal(artefact)[0])]
    refused(lambda: list(device.stub.Ask(iter(requests), timeout=TIMEOUT)))


def steps_of(artefact: Artefact, *rows: list[int]) -> Iterator[pb.AdaptRequest]:
    yield adapt_opening(artefact)
    yield examples(EXAMPLES)
    for number, each in enumerate(rows):
        yield step(mine(artefact, number), each)


def adapted(device: Device, artefact: Artefact) -> None:
    assert len(list(device.stub.Adapt(steps_of(artefact, [0, 2], [1]), timeout=TIMEOUT))) == 2


def adapt_refused(device: Device, artefact: Artefact) -> None:
    refused(lambda: list(device.stub.Adapt(steps_of(artefact, [0], [99]), timeout=TIMEOUT)))


def adapt_failed(device: Device, artefact: Artefact) -> None:
    refused(lambda: list(device.stub.Adapt(steps_of(artefact, [0]), timeout=TIMEOUT)))


def adapt_client_gone(device: Device, artefact: Artefact) -> None:
    go = threading.Event()

    def requests() -> Iterator[pb.AdaptRequest]:
        yield from steps_of(artefact, [0])
        go.wait(TIMEOUT)

    call = device.stub.Adapt(requests(), timeout=TIMEOUT)
    next(call)
    device.channel.close()
    go.set()


def broken(*_: object, **__: object) -> Any:
    raise ZeroDivisionError


def idle(*_: object) -> dict[Request, int]:
    time.sleep(0.01)
    return {}


CHANGED: dict[Any, tuple[type, str, Callable[..., Any]]] = {
    gradient_failed: (GradientEngine, "_groups", broken),
    adapt_failed: (AdaptationEngine, "_pass", broken),
    generate_late: (GenerationEngine, "_plan", idle),
}


@pytest.mark.parametrize("call", [
    generated, generate_cancelled, generate_refused, generate_late, scored, gradient_of, gradient_failed,
    asked, ask_client_gone, ask_refused, adapted, adapt_refused, adapt_failed, adapt_client_gone,
])  # fmt: skip
def test_nobody_keeps_anything_of_a_call(
    call: Callable[[Device, Artefact], None], run: Callable[..., Running], artefact: Artefact,
    generation: GenerationEngine, step_queue: StepQueue, arrays: list[weakref.ref[Any]],
    monkeypatch: pytest.MonkeyPatch, frozen: None,
) -> None:  # fmt: skip
    if call in CHANGED:
        monkeypatch.setattr(*CHANGED[call])
    running = run()
    device = running.device()
    gc.collect()
    gc.freeze()  # the server's own messages, too
    call(device, artefact)
    device.channel.close()
    wait_for(lambda: left() == [])
    assert arrays
    assert all(array() is None for array in arrays)


def test_nobody_keeps_anything_of_answers_that_failed(
    run: Callable[..., Running], artefact: Artefact, generation: GenerationEngine,
    monkeypatch: pytest.MonkeyPatch, frozen: None,
) -> None:  # fmt: skip
    monkeypatch.setattr(generation, "_plan", broken)
    device = run().device()
    gc.collect()
    gc.freeze()
    refused(lambda: generated(device, artefact))
    device.channel.close()
    wait_for(lambda: left() == [])
