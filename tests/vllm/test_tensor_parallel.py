"""Two worker processes of vLLM's, each with half of every block: they answer, forget and end as one would."""

from __future__ import annotations

import ctypes
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from perfit_cloud.audit.memory import look_at
from perfit_cloud.audit.needles import Needle, raw, token_ids
from perfit_cloud.audit.search import Index
from perfit_cloud.engine.device_lock import DeviceLock
from perfit_cloud.engine.generation.factory import build_engine, engine_kind
from perfit_shared.errors import ConfigError, Unavailable
from perfit_shared.types import Sampling
from tests.support.engine_subject import SMALL, Subject, endless
from tests.support.generation import NEW, alone, prompts, serve, uses
from tests.support.memory import looking
from tests.support.models import random_artefact
from tests.support.sockets import LOOPBACK, listening
from tests.support.vllm_engines import dividing, stopped_at_first_token
from tests.support.vllm_served import PROGRAM, person
from tests.support.waiting import wait_for

pytestmark = dividing
_END_SECONDS = 60.0
_PROMPT = [0, *np.random.default_rng(8).integers(3, 250, 60).tolist()]
_FLAGS = 256  # bytes in front of what workers exchange


@pytest.fixture(scope="module")
def subject(load: Any, make_artefact: Any) -> Iterator[Subject]:
    """One engine for the tests of this module, since it takes a minute to start; the last test breaks it."""
    base = endless(load("llama"))
    artefacts = {
        "news_headline": make_artefact(base),
        "chat": make_artefact(base, "chat", positions="s1+f1+l4", layers=(0, 2, 3), seed=9, ranks=(4, 5)),
    }
    lock = DeviceLock()
    engine = build_engine(base, artefacts, replace(SMALL, tensor_parallel=2), lock, "vllm")
    yield Subject(base, artefacts, engine, lock.hold)
    engine.stop()


@pytest.fixture(scope="module")
def executor(subject: Subject) -> Any:
    return subject.engine._core._core.model_executor  # type: ignore[attr-defined]


@pytest.mark.parametrize("parts", [3, 8])
def test_a_model_that_cannot_be_divided_is_refused_before_anything_starts(
    parts: int, load: Callable[[str], Any]
) -> None:
    """It has four heads, two of keys; of those each of four workers would get one, as another does."""
    assert engine_kind(load("llama"), "vllm", 4)
    with pytest.raises(ConfigError, match=f"tensor_parallel is {parts}.*4 heads"):
        engine_kind(load("llama"), "vllm", parts)


def test_answers_are_those_of_single_hooked_passes(subject: Subject) -> None:
    """Of mixed users and modes, with prompts that are read in parts."""
    threads = torch.get_num_threads()
    asked = [
        (prompt, use, Sampling(NEW))
        for prompt, use in zip(prompts(16), uses(subject.artefacts, 16), strict=True)
    ]
    for (prompt, use, _), got in zip(asked, serve(subject.engine, asked), strict=True):
        assert got == alone(subject.base, prompt, use)
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("end", ["read", "cancelled"])
def test_no_worker_keeps_pages_tensors_token_ids_or_messages(
    end: str, subject: Subject, executor: Any
) -> None:
    engine: Any = subject.engine
    with stopped_at_first_token(engine) as is_stopped:
        stream = engine.submit(_PROMPT, subject.person(1), Sampling(60))
        assert is_stopped()
        during = executor.collective_rpc(_held)
        assert len({held["pid"] for held in during} | {os.getpid()}) == 3
        assert all(all(held.values()) for held in during), during
    if end == "cancelled":
        stream.cancel()
    else:
        list(stream)
    wait_for(lambda: not engine._core.is_busy and engine.cache_tokens_held == 0)
    with subject.held():  # the step that tells the workers is over
        kept = {"messages"} if any(_messages(executor)) else set()
        for held in executor.collective_rpc(_held):
            kept |= {key for key, value in held.items() if value}
        assert kept == {"pid"}


def test_memory_that_is_shared_has_no_name(executor: Any) -> None:
    names = [queue.buffer.shared_memory._name for queue in _queues(executor)]
    assert names and not any(Path("/dev/shm" + name).exists() for name in names)  # noqa: S108


def test_who_waits_when_a_worker_is_killed_hears_it(subject: Subject, executor: Any) -> None:
    with stopped_at_first_token(subject.engine) as is_stopped:  # no step is under way that could fail of it
        stream = subject.engine.submit(_PROMPT, subject.person(1), Sampling(150))
        assert is_stopped()
        assert subject.engine.health().is_alive
        os.kill(executor.workers[1].proc.pid, signal.SIGKILL)
        wait_for(lambda: not subject.engine.health().is_alive)
    with pytest.raises(Unavailable):
        list(stream)
    wait_for(lambda: not any(worker.proc.is_alive() for worker in executor.workers), seconds=_END_SECONDS)
    wait_for(lambda: _refuses(subject))


def _refuses(subject: Subject) -> bool:
    try:
        subject.engine.submit([0, 5], subject.person(1), Sampling(2)).cancel()
    except Unavailable:
        return True
    return False


def _queues(executor: Any) -> list[Any]:
    return [executor.rpc_broadcast_mq, *executor.response_mqs]


def _messages(executor: Any) -> list[bool]:
    """Whether there is anything in the queues' memory, beside its flags."""
    return [
        bool(np.frombuffer(queue.buffer.shared_memory.buf, np.uint8)[: queue.buffer.metadata_offset].any())
        for queue in _queues(executor)
    ]


def _held(worker: Any) -> dict[str, Any]:
    """Of a user, in a worker: what is not zero, or not empty. Called there."""
    runner = worker.worker.model_runner
    shifts = runner.perfit
    if shifts._shifts:  # to be looked at once it is over
        runner.held = [t for use in shifts._shifts.values() for phi in use.personal.values() for t in phi]
    layout = shifts._channel.layout
    return {
        "pid": os.getpid(),
        "pages": any(np.any(np.asarray(cache)) for cache in runner.kv_caches),
        "token ids": bool(runner.input_batch.token_ids_cpu.any()),
        "input ids": bool(runner.input_ids.cpu.any()),
        "slots": bool(shifts._channel._floats[-layout.slots * layout.slot_floats :].any()),
        "tensors": any(bool(tensor.any()) for tensor in runner.held),
        "shifts": len(shifts._shifts),
        "exchanged": _exchanged(),
    }


def _exchanged() -> bool:
    """Whether there is anything in the memory through which workers hand each other parts of rows."""
    found = False
    for line in Path("/proc/self/maps").read_text("utf-8").splitlines():
        if "cpushm" in line:
            start = int(line.partition("-")[0], 16)
            found |= any(ctypes.string_at(start + _FLAGS, 4 << 20))
    return found


@looking
def test_workers_are_hardened_as_their_server_is_and_end_with_it(
    load: Callable[[str], Any], model_folder: Callable[[str], Path]
) -> None:
    """Another family, in processes that nobody has looked into."""
    base = endless(load("gemma3_text"))
    use = person(random_artefact(base), 5)
    assert use.personal is not None
    tensors = [raw("tensor", array.tobytes()) for _, array in use.personal.named()]
    ids = [*token_ids("ids", [_PROMPT]), raw("ids in a message", pickle.dumps(_PROMPT)[20:-20])]
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(model_folder("gemma3_text"))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    ) as server:
        try:
            workers = [held["pid"] for held in _hardened(_said(server))]
            before = _found(workers, [*tensors, *ids])
            assert _said(server, {"prompt": _PROMPT, "seed": 5}) == "running"
            during = _found(workers, [*tensors, *ids])
            answer = _said(server, "go on")
            time.sleep(6)  # until the last sweep is over
            after = _found(workers, [*tensors, *ids])
            ports = listening(server.pid)
        finally:
            server.kill()
    wait_for(lambda: not any(map(_runs, workers)), seconds=_END_SECONDS)
    assert answer == alone(base, _PROMPT, use, 40)
    assert {"tensor", "ids int32"} <= {kind for kind, _ in during}
    assert not before and not after, (before, after)
    assert ports <= LOOPBACK


def _found(pids: list[int], needles: list[Needle]) -> set[tuple[str, str]]:
    """What of the needles is in the memory of these processes, and where."""
    index = Index(needles)
    return {(needles[f.needle].kind, f.where) for pid in pids for f in look_at(pid, index).found}


def _runs(pid: int) -> bool:
    """Not if it has ended, and nobody has taken note."""
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "State:\tZ" not in status.read_text("utf-8")


def _said(server: Any, line: Any = None) -> Any:
    if line is not None:
        print(json.dumps(line), file=server.stdin, flush=True)
    said = server.stdout.readline()
    assert said, "the server is gone"
    return json.loads(said)


def _hardened(workers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    assert len(workers) == 2
    for held in workers:
        expected = {"is dumpable": 0, "core": [0, 0], "has our free": True, "preloads ours": False}
        assert {**held, "pid": 0} == {**expected, "pid": 0}
    return workers
