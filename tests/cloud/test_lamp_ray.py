"""A LaMP run on Ray: two workers leave the same files as one process, and outlive a killed one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.support.lamp_files import TASK, write_files
from tests.support.lamp_requests import small_request

from perfit_cloud.lamp.ray_workers import RayCluster, RayWorkers
from perfit_cloud.lamp.request import LampRequest
from perfit_cloud.lamp.results import Run
from perfit_cloud.lamp.run import run_lamp
from perfit_shared.errors import Cancelled, InvalidInput, Unavailable
from perfit_shared.tasks import TASKS

pytest.importorskip("ray", reason="Ray is not installed")
pytestmark = pytest.mark.slow

TWO = RayCluster("local", workers=2)


@pytest.fixture(scope="module")
def request_for(
    model_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., LampRequest]:
    data = write_files(tmp_path_factory.mktemp("lamp"))

    def make(out: Path, **changes: Any) -> LampRequest:
        ours = {"data": data, "out": out, "threads": 1, "dtype": "float32"}
        return small_request(model_folder("llama"), **(ours | changes))

    return make


@pytest.fixture(scope="module")
def here(request_for: Callable[..., LampRequest], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The same in this process."""
    return run_lamp(request_for(tmp_path_factory.mktemp("here")))


def figures(run: Run) -> dict[str, Any]:
    summary = json.loads((run.folder / "summary.json").read_text())
    return {key: value for key, value in summary.items() if key != "seconds"}


def files(run: Run) -> dict[str, bytes]:
    """States, losses and answers of everybody, to the byte."""
    found = {}
    for path in sorted(run.folder.glob("users/*/*")):
        if path.name in {"personal.safetensors", "result.json"}:
            found[f"{path.parent.name}/{path.name}"] = path.read_bytes()
    return found


def test_two_workers_leave_what_one_process_leaves(
    here: Run, request_for: Callable[..., LampRequest], tmp_path: Path
) -> None:
    theirs = run_lamp(request_for(tmp_path), ray=TWO)
    assert figures(theirs) == figures(here)
    assert files(theirs) == files(here) and len(files(here)) == 10


def test_a_method_that_changes_the_model_has_the_same_figures_too(
    request_for: Callable[..., LampRequest], tmp_path: Path
) -> None:
    options = {"method": "oppu", "collective_users": 4, "layers": None, "positions": None}
    options |= {"collective_rank": None, "personal_rank": None, "queries": 1, "examples": 4}
    one = run_lamp(request_for(tmp_path / "one", **options))
    two = run_lamp(request_for(tmp_path / "two", **options), ray=TWO)
    assert figures(one) == figures(two)


def test_a_killed_worker_comes_back_and_figures_stay(
    here: Run, request_for: Callable[..., LampRequest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed: list[int] = []
    fit = RayWorkers.fit

    def kill_first(self: RayWorkers, cohorts: Any) -> Any:
        killed.append(self.process_ids()[0])
        threading.Timer(0.05, os.kill, (killed[0], signal.SIGKILL)).start()
        yield from fit(self, cohorts)
        time.sleep(0.2)
        assert killed[0] not in self.process_ids(), "another process has its place"

    monkeypatch.setattr(RayWorkers, "fit", kill_first)
    theirs = run_lamp(request_for(tmp_path), ray=TWO)
    assert killed and figures(theirs) == figures(here) and files(theirs) == files(here)


def test_stopped_and_gone_on_elsewhere(
    here: Run, request_for: Callable[..., LampRequest], tmp_path: Path
) -> None:
    """Stopped with workers while people are fitted, finished in this process."""

    def some_are_fitted() -> bool:
        return bool(list(tmp_path.glob("users/*/stage2.json")))

    with pytest.raises(Cancelled):
        run_lamp(request_for(tmp_path), ray=TWO, stop=some_are_fitted)
    assert 0 < len(list(tmp_path.glob("users/*/personal.safetensors"))) <= 5
    assert not (tmp_path / "summary.json").exists()
    theirs = run_lamp(request_for(tmp_path))
    assert figures(theirs) == figures(here) and files(theirs) == files(here)


def test_a_workers_error_is_ours(request_for: Callable[..., LampRequest], tmp_path: Path) -> None:
    """OUT that the workers find empty: they would answer for another run."""
    request, on_stop = request_for(tmp_path), signal.getsignal(signal.SIGTERM)
    with pytest.raises(InvalidInput, match="empty on a worker's machine"):
        RayWorkers(TWO, request, TASKS[TASK], lambda: False)
    assert signal.getsignal(signal.SIGTERM) is on_stop, "Ray's would end the run without a checkpoint"


NODE = "The current node timed out during startup. This could happen because …"
PORT = "Timed out waiting for file /tmp/session/gcs_server_port_4f23"


@pytest.mark.parametrize(("late", "message"), [(1, NODE), (1, PORT), (3, NODE)])
def test_a_cluster_that_comes_up_too_late_is_started_again(
    late: int,
    message: str,
    here: Run,
    request_for: Callable[..., LampRequest],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ray leaves the processes of one that was later."""
    ray = pytest.importorskip("ray")
    start, left = ray.init, []

    def init(*args: Any, **options: Any) -> Any:
        if len(left) < late:
            left.append(subprocess.Popen(["sleep", "600"]))
            raise Exception(message)
        return start(*args, **options)

    monkeypatch.setattr(ray, "init", init)
    if late < 3:
        assert files(run_lamp(request_for(tmp_path), ray=TWO)) == files(here)
    else:
        with pytest.raises(Unavailable, match="timed out"):
            run_lamp(request_for(tmp_path), ray=TWO)
    assert [process.wait(10) for process in left] == [-signal.SIGKILL] * late


def test_workers_should_be_some() -> None:
    with pytest.raises(InvalidInput):
        RayCluster("local", workers=0)
