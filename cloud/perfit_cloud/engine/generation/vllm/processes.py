"""vLLM's worker processes: how they start, what of the server's hardening holds in them, and how they end.

vLLM starts one for each part of the weights, where there is more than one. They hold what a worker in the
server's process would, so they are hardened like it; and they end with it, however it ends.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from multiprocessing import connection, parent_process, resource_tracker
from pathlib import Path
from typing import Any

import torch

from perfit_cloud.engine.device_lock import DeviceLock
from perfit_cloud.engine.generation.vllm.messages import forget_name, overwrite_as_read, overwrite_read
from perfit_cloud.engine.generation.vllm.weights import InheritedDescriptor
from perfit_cloud.hardening.process import hardening_children, is_hardened
from perfit_cloud.hardening.scrubber import MemoryScrubber

__all__ = ["WorkerProcess", "WorkerProcesses", "enter_worker", "starting_workers"]

_log = logging.getLogger(__name__)
_GRACE_SECONDS = 10.0  # for a worker whose server is gone; then it ends, whatever it does
_EXCHANGED_BYTES = 8 << 20  # of memory that a thread of each worker exchanges through, twice what there is
# What vLLM sets in this process for its workers, or we do.
_FOR_WORKERS = ("OMP_NUM_THREADS", "OMP_NUM_THREADS_SET_BY_VLLM", "VLLM_RPC_BASE_PATH")


# -- in the server ---------------------------------------------------------------------------------


@contextmanager
def starting_workers(count: int, device: torch.device, folder: Path) -> Iterator[dict[str, Any]]:
    """While this lasts, vLLM may start workers; this is what they are told.

    `folder`: for the names of sockets, which nobody needs once all are connected.
    """
    if count == 1:
        yield {"is_alone": True}
        return
    before, threads = {name: os.environ.get(name) for name in _FOR_WORKERS}, torch.get_num_threads()
    os.environ["VLLM_RPC_BASE_PATH"] = str(folder)
    if device.type == "cpu":  # else vLLM knows what its workers need
        os.environ["OMP_NUM_THREADS"] = str(max(1, threads // count))
    resource_tracker.ensure_running()  # a process of Python's, which needs nothing of the following
    try:
        with hardening_children() as library:
            inherited = None if library is None else InheritedDescriptor(library)
            yield {"is_alone": False, "library": inherited}  # which it inherits by being told
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        if torch.get_num_threads() != threads:  # vLLM takes this process for one that computes nothing
            torch.set_num_threads(threads)


class WorkerProcesses:
    """Those of an engine core that has started."""

    def __init__(self, executor: Any, ended: Callable[[], None]) -> None:
        """`ended` is called, in a thread of vLLM's, when one ended and the others were stopped."""
        self._executor = executor
        forget_name(executor.rpc_broadcast_mq)
        for queue in executor.response_mqs:
            overwrite_as_read(queue)
            overwrite_read(queue, wait=False)  # those of the start
        executor.register_failure_callback(ended)

    @property
    def are_alive(self) -> bool:
        return not self._executor.is_failed

    def overwrite_messages(self, *, wait: bool) -> None:
        """Those that all have read; `wait`: until all have read all."""
        if (queue := self._executor.rpc_broadcast_mq) is not None:
            overwrite_read(queue, wait=wait and self.are_alive)


# -- in a worker -----------------------------------------------------------------------------------


def enter_worker(told: dict[str, Any]) -> None:
    """Called before there is anything in the process that could be of a user."""
    if told["is_alone"]:
        return
    # Both also reach whole groups of processes, where the server alone shall end, once its calls have.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_server, name="perfit-server-watch", daemon=True).start()
    logging.getLogger("vllm").setLevel(logging.ERROR)


def _end_with_server() -> None:
    """vLLM asks a worker to end then; one that is stuck in a pass would not hear it."""
    server = parent_process()
    if server is not None:
        connection.wait([server.sentinel])
        time.sleep(_GRACE_SECONDS)
        os._exit(1)


class WorkerProcess:
    """What is to be done in a worker process, and in the server's own is not, or is done for all of it."""

    def __init__(self, device: torch.device) -> None:
        """Called when all workers have joined."""
        from vllm.distributed.parallel_state import get_tp_group

        self._device, group = device, get_tp_group()
        if group.mq_broadcaster is not None:
            forget_name(group.mq_broadcaster)
        # On a CPU workers exchange what they computed through memory, which would outlive one that is killed.
        name = (
            getattr(group.device_communicator.dist_module, "group_name", None)
            if device.type == "cpu"
            else None
        )
        if name is not None:
            Path(f"/dev/shm/{name}_{group.rank_in_group}").unlink(missing_ok=True)  # noqa: S108
        self._lock = DeviceLock()
        self._scrubber = _scrubber(device, self._lock) if is_hardened() else None

    def hold(self) -> AbstractContextManager[None]:
        """For a pass."""
        return self._lock.hold()

    def call_ended(self) -> None:
        if self._scrubber is not None:
            self._scrubber.call_ended()

    def overwrite_exchanged(self) -> None:
        """All workers call it in the same step: zeros go where the rows of earlier passes went.

        On a CPU alone; the memory by which cards exchange is the driver's and NCCL's.
        """
        from vllm.distributed import tensor_model_parallel_all_reduce

        if self._device.type == "cpu":
            tensor_model_parallel_all_reduce(torch.zeros(_EXCHANGED_BYTES * torch.get_num_threads() // 4))


def _scrubber(device: torch.device, lock: DeviceLock) -> MemoryScrubber:
    scrubber = MemoryScrubber([device], lock)
    scrubber.start()
    if not (scrubber.overwrites_stacks() and scrubber.overwrites_tensors()):
        _log.warning("traces of calls may stay in the memory of vLLM's workers; see docs/vllm.md")
    return scrubber
