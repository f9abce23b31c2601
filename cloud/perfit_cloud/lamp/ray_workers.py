"""Cohorts of a LaMP run as Ray tasks: one actor for each worker, which loads the model once.

The run itself stays one process: it reads the people, trains what everybody shares (stage 1) and decides
what is left to do. Workers read the same DATA, MODEL and OUT and write a cohort's files into OUT, so on
several machines these must be in folders that all of them have at the same path. A worker that finds
other data or another model there than the run did refuses.

A worker that dies is started again by Ray, and its cohort goes on from the last checkpoint.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from perfit_cloud.lamp.cohorts import STOPPED, CohortWork
from perfit_cloud.lamp.methods import METHODS
from perfit_cloud.lamp.methods.interface import TaskData
from perfit_cloud.lamp.people import Person, read_people
from perfit_cloud.lamp.request import LampRequest
from perfit_cloud.lamp.settings import check_out, settings_of_all
from perfit_cloud.model.base import load_base
from perfit_shared.errors import Cancelled, InvalidInput, PerfitError, Unavailable
from perfit_shared.tasks import Task

__all__ = ["RayCluster", "RayWorkers"]

_Work = TypeVar("_Work", bound=tuple[Any, ...])  # (cohort, …): what a worker's method takes
_LOOK_SECONDS = 0.5  # between two looks whether to stop
_STOP_SECONDS = 60.0  # for a step to end and a checkpoint to be written
_RESTARTS = 3  # of one worker
_STARTS = 3  # of a cluster on this machine
_TIMED_OUT = "timed out"  # in Ray's messages, whichever of its processes was late
_OBJECT_STORE_BYTES = 128 << 20  # least that Ray takes is 75 MiB; tasks pass ids and nothing else


@dataclass(frozen=True)
class RayCluster:
    """Where people are fitted and measured."""

    address: str  # "local": processes of this machine; else of a running cluster, host:port
    workers: int | None = None  # as many as the cluster has GPUs, or CPUs for

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 1:
            raise InvalidInput("--ray-workers should be at least 1")


class Worker:
    """What one actor holds: the model, the people and the method, once they are loaded.

    Not by `__init__`, whose errors Ray keeps to itself. A worker that was started again loads at its task.
    """

    def __init__(self, request: LampRequest, task: Task) -> None:
        self._request, self._task, self._threads = request, task, request.threads
        self._stopped = threading.Event()
        self._work: CohortWork | None = None

    def load(self) -> int:
        """The process id. Raises InvalidInput, InvalidData."""
        self._loaded()
        return os.getpid()

    def _loaded(self) -> CohortWork:
        self._set_threads()
        if self._work is not None:
            return self._work
        request, task = self._request, self._task
        base = load_base(request.model, dtype=request.dtype, device=request.device)
        people = read_people(
            request.data, task, base, users=request.users, examples=request.examples, queries=request.queries
        )
        data = TaskData(task, base, people)
        if not check_out(request.out, task, settings_of_all(request, data)):
            raise InvalidInput(f"{request.out} is empty on a worker's machine; use a folder that all share")
        method = METHODS[request.method](request, data)
        method.prepare(self._stopped.is_set)  # finds what the run has trained
        self._work = CohortWork(request, data, method, self._stop)
        return self._work

    def fit(self, user_ids: Sequence[str]) -> None:
        work = self._loaded()
        work.fit(_those(work, user_ids), lambda *_: None, lambda _: None)

    def measure(self, user_ids: Sequence[str], modes: Sequence[str]) -> None:
        """One mode after another: they share a person's file."""
        work = self._loaded()
        for mode in modes:
            self._stop()
            work.measure(_those(work, user_ids), mode, lambda _: None)

    def stop(self) -> None:
        """The cohort under way saves its checkpoint and ends with Cancelled."""
        self._stopped.set()

    def _set_threads(self) -> None:
        """OpenMP counts threads for each thread that calls it, and Ray runs tasks in several."""
        import torch

        if self._threads > 0:
            torch.set_num_threads(self._threads)

    def _stop(self) -> None:
        if self._stopped.is_set():
            raise Cancelled(STOPPED)


class RayWorkers:
    """The actors of one run."""

    def __init__(
        self, cluster: RayCluster, request: LampRequest, task: Task, should_stop: Callable[[], bool]
    ) -> None:
        """Starts them, and a cluster on this machine for "local". Raises InvalidInput, Unavailable."""
        self._ray, self._should_stop, self._folder = _imported(), should_stop, ""
        self._connect(cluster)
        try:
            threads = max(1, request.threads)
            gpus = 1 if request.device != "cpu" and self._ray.cluster_resources().get("GPU", 0) else 0
            count = cluster.workers or self._room(threads, gpus)
            actor = self._ray.remote(Worker).options(
                num_cpus=threads,
                num_gpus=gpus,
                max_concurrency=2,  # a task, and `stop`
                max_restarts=_RESTARTS,
                max_task_retries=_RESTARTS,
            )
            request = replace(_absolute(request), threads=0 if gpus and not request.threads else threads)
            self._actors = [actor.remote(request, task) for _ in range(count)]
            self.process_ids()  # all are loaded
        except BaseException:
            self.close()
            raise

    @property
    def count(self) -> int:
        return len(self._actors)

    def process_ids(self) -> list[int]:
        ids: list[int] = self._got([each.load.remote() for each in self._actors])
        return ids

    def fit(self, cohorts: Sequence[Sequence[Person]]) -> Iterator[Sequence[Person]]:
        """Those whose states are saved, as they come. Raises Cancelled once asked to stop."""
        yield from (cohort for (cohort,) in self._done("fit", [(cohort,) for cohort in cohorts]))

    def measure(
        self, work: Sequence[tuple[Sequence[Person], Sequence[str]]]
    ) -> Iterator[tuple[Sequence[Person], Sequence[str]]]:
        """(cohort, modes) whose results are saved, as they come. Raises Cancelled."""
        yield from self._done("measure", work)

    def close(self) -> None:
        self._ray.shutdown()
        if self._folder:
            shutil.rmtree(self._folder, ignore_errors=True)

    # -- plumbing ------------------------------------------------------------------------------

    def _connect(self, cluster: RayCluster) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_worker_niceness", "0")  # as this process; 15 starves beside other work
        os.environ.setdefault("RAY_gcs_server_port_wait_time_s", "120")  # 30 are too few beside it
        on_stop = signal.getsignal(signal.SIGTERM)
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
        try:
            if cluster.address == "local":
                self._start_local(cluster.workers or 0, quiet)
            else:
                self._ray.init(cluster.address, **quiet)
        except Exception as error:  # Ray raises plain ones, too
            raise Unavailable(f"no Ray cluster at {cluster.address}: {str(error)[:200]}") from error
        finally:
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, on_stop)  # Ray has put one of its own, which saves nothing

    def _start_local(self, workers: int, quiet: Mapping[str, Any]) -> None:
        """Again when its processes came up too late, as they may beside other work."""
        import psutil

        before = set(psutil.Process().children())
        for starts_left in reversed(range(_STARTS)):
            self._folder = tempfile.mkdtemp(prefix="perfit-ray-")
            try:
                self._ray.init(
                    "local",
                    num_cpus=max(workers, os.cpu_count() or 1),
                    include_dashboard=False,
                    object_store_memory=_OBJECT_STORE_BYTES,
                    _node_ip_address="127.0.0.1",
                    _temp_dir=self._folder,
                    **quiet,
                )
                return
            except Exception as error:
                for process in set(psutil.Process().children()) - before:  # Ray leaves them
                    with contextlib.suppress(psutil.NoSuchProcess):
                        process.kill()
                shutil.rmtree(self._folder, ignore_errors=True)
                if _TIMED_OUT not in str(error).lower() or not starts_left:
                    raise

    def _room(self, threads: int, gpus: int) -> int:
        resources = self._ray.cluster_resources()
        return max(1, int(resources.get("GPU", 0) if gpus else resources.get("CPU", 1) // threads))

    def _done(self, method: str, work: Sequence[_Work]) -> Iterator[_Work]:
        """Give whoever is idle the next; yield what is done, in the order in which it ends."""
        waiting, idle = deque(work), list(self._actors)
        running: dict[Any, tuple[Any, _Work]] = {}
        while waiting or running:
            while waiting and idle:
                (cohort, *modes), actor = waiting[0], idle.pop()
                ids = [person.user_id for person in cohort]
                running[getattr(actor, method).remote(ids, *modes)] = actor, waiting.popleft()
            ended, _ = self._ray.wait(list(running), timeout=_LOOK_SECONDS)
            for reference in ended:
                actor, done = running.pop(reference)
                self._got(reference)
                idle.append(actor)
                yield done
            if self._should_stop():
                for actor in self._actors:
                    actor.stop.remote()
                self._ray.wait(list(running), num_returns=len(running), timeout=_STOP_SECONDS)
                raise Cancelled(STOPPED)

    def _got(self, reference: Any) -> Any:
        """A task's value. Raises the error that it raised, or Unavailable when its worker is gone."""
        try:
            return self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, PerfitError):
                raise error.cause from None
            raise
        except self._ray.exceptions.RayActorError as error:
            raise Unavailable(
                f"a Ray worker died {_RESTARTS + 1} times, perhaps for want of memory; the same command "
                "goes on from there"
            ) from error


def _those(work: CohortWork, user_ids: Sequence[str]) -> list[Person]:
    people = {person.user_id: person for person in work.people}
    return [people[each] for each in user_ids]


def _absolute(request: LampRequest) -> LampRequest:
    """With paths that mean the same wherever a worker runs."""
    paths: dict[str, Any] = {
        f.name: v.absolute() for f in fields(request) if isinstance(v := getattr(request, f.name), Path)
    }
    model = Path(request.model).expanduser()
    return replace(request, **paths, model=str(model.absolute()) if model.exists() else request.model)


def _imported() -> Any:
    try:
        import ray
    except ImportError:
        raise InvalidInput('--ray needs Ray: pip install "perfit[ray]"') from None
    return ray
