"""Agents that are killed in the middle of something, and disks that take no more: nothing is lost."""

from __future__ import annotations

import contextlib
import os
import random
import resource
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from tests.support.agents import SECRET, InThread, connected, kill, running
from tests.support.device import Perfit
from tests.support.waiting import wait_for

from perfit_device.history import HistoryItem
from perfit_device.operations.ask import Ask, Question
from perfit_device.operations.examples import AddExample, FindExamples
from perfit_device.operations.imports import ImportExamples, UndoImport
from perfit_device.operations.operation import Operation
from perfit_device.operations.update import Update
from perfit_device.settings import DeviceSettings
from perfit_device.vault.store import Vault
from perfit_shared.errors import Unavailable, VaultError
from perfit_shared.types import Mode

pytestmark = pytest.mark.slow

TASK = "news_headline"
SLOW = Update(settings={"epochs": 40}, checkpoint_seconds=0.0)
SHORT = Update(settings={"epochs": 6}, checkpoint_seconds=0.0)
MANY = ImportExamples(
    [HistoryItem(TASK, {"text": f"Snow fell {n} times.", "title": "Snow"}) for n in range(400)], offline=True
)


@pytest.fixture
def settings(home: Path) -> DeviceSettings:
    return DeviceSettings("default", home)


def examples(settings: DeviceSettings) -> int:
    """As whoever opens the vault next finds them, all of them whole."""
    with Vault.open(settings.vault_path, SECRET, wait_seconds=0.0) as vault:
        return len(vault.list("example"))


# -- kills -----------------------------------------------------------------------------------------


def test_kills_at_random_moments_lose_nothing(ready: Perfit, cloud: Any, settings: DeviceSettings) -> None:
    """What was answered before the kill is there, and an update resumes."""
    rng = random.Random(7)
    cloud.fail = lambda method: time.sleep(0.01)
    added = 0
    for _ in range(4):
        with running(settings) as pid, InThread(lambda: connected(settings).perform(SLOW)):
            with connected(settings) as agent:
                end = time.monotonic() + rng.uniform(0.2, 1.0)
                while time.monotonic() < end:
                    agent.perform(AddExample(f"It rained {added} times.", "Rain", TASK))
                    added += 1
            kill(pid)
        assert examples(settings) == 20 + added
    assert added > 4
    cloud.fail = lambda method: None
    ready.ok("update", "--epochs", "2")


def test_a_kill_while_it_is_asked(ready: Perfit, cloud: Any, settings: DeviceSettings) -> None:
    """Whoever asked is told to try again, and the next command works: without an agent, and at a new one."""
    asked, go_on = threading.Event(), threading.Event()
    cloud.fail = lambda method: asked.set() or (go_on.wait(60) and None) if method == "Generate" else None
    base = Ask(Question("The council met."), (Mode.BASE,))
    with running(settings) as pid:
        with InThread(lambda: connected(settings).perform(base)) as asking:
            assert asked.wait(60)
            kill(pid)
        assert isinstance(asking.error, Unavailable) and "went away; try again" in str(asking.error)
        go_on.set()
        assert ready.ok("ask", "x", "--mode", "base") == "Hello world base \n"
    with running(settings):
        assert ready.ok("ask", "x", "--mode", "base") == "Hello world base \n"
    assert examples(settings) == 20


def test_an_update_goes_on_from_its_checkpoint_after_a_kill(
    ready: Perfit, cloud: Any, settings: DeviceSettings
) -> None:
    """Of which there is one a step, and one step may be under way."""
    cloud.fail = lambda method: time.sleep(0.01)
    steps = [0]
    with (
        running(settings) as pid,
        InThread(lambda: connected(settings).perform(SHORT, lambda e: steps.append(getattr(e, "done", 0)))),
    ):
        wait_for(lambda: steps[-1] >= 10)
        kill(pid)
    with running(settings), connected(settings) as agent:
        assert agent.perform(SHORT).trained.resumed_from >= steps[-1] - 1


@pytest.mark.parametrize("what", ["import", "undo"])
def test_a_kill_in_an_import_and_in_taking_it_back(
    ready: Perfit, settings: DeviceSettings, what: str
) -> None:
    """All of its examples are there, or none; then the command does what is left."""
    rng = random.Random(3)
    for _ in range(4):
        operation: Operation[Any] = MANY
        with running(settings) as pid, connected(settings) as agent:
            if what == "undo":
                operation = UndoImport(agent.perform(MANY).number)
            with InThread(lambda: agent.perform(operation)) as working:  # noqa: B023
                time.sleep(rng.uniform(0.0, 0.1))
                kill(pid)
        found = examples(settings)
        assert found in (20, 420)
        if working.error is None:
            assert found == (420 if what == "import" else 20), "it was told of"
        assert len(ready.json("history", "imports")) == (2 if found == 420 else 1)
        if found == 420:
            ready.ok("history", "undo", "--yes")
        assert examples(settings) == 20


# -- disks -----------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="needs prlimit")
@pytest.mark.parametrize("what", ["import", "undo", "update"])
def test_files_of_an_agent_that_may_not_grow(
    ready: Perfit, cloud: Any, settings: DeviceSettings, what: str
) -> None:
    """A limit from outside stands in for a disk that fills at any byte of what is written."""
    rng, refused = random.Random(4), 0
    with running(settings) as pid, connected(settings) as agent:
        if what == "undo":
            agent.perform(MANY)
        operation = {"import": MANY, "undo": UndoImport(2), "update": SHORT}[what]
        before, size = agent.perform(FindExamples()), settings.vault_path.stat().st_size
        for _ in range(6):
            limit_files(pid, rng.randrange(size))
            with contextlib.suppress(VaultError):
                agent.perform(operation)
                break
            refused += 1
            limit_files(pid)
            assert agent.perform(FindExamples()) == before
        limit_files(pid)
        if refused == 6:
            agent.perform(operation)
        expected = {"import": 420, "undo": 20, "update": 20}[what]
        assert len(agent.perform(FindExamples())) == expected
    assert refused and examples(settings) == expected


def limit_files(pid: int, size: int = resource.RLIM_INFINITY) -> None:
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root mounts a small disk")
def test_a_disk_that_is_full(tmp_path: Path, cheap_vaults: None, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    words = ["mount", "-t", "tmpfs", "-o", "size=1m,mode=700", "perfit-test", str(home)]
    if subprocess.run(words, capture_output=True, check=False).returncode:
        pytest.skip("nothing can be mounted here")
    try:
        monkeypatch.setenv("PERFIT_HOME", str(home))
        settings = DeviceSettings("default", home)
        Vault.create(settings.vault_path, SECRET).close()
        with running(settings), connected(settings) as agent:
            agent.perform(AddExample("It rained.", "Rain", TASK))
            (home / "ballast").write_bytes(bytes(1 << 19))
            with pytest.raises(VaultError, match="disk is full"):
                agent.perform(AddExample("x" * 600_000, "Rain", TASK))
            assert len(agent.perform(FindExamples())) == 1
            (home / "ballast").unlink()
            agent.perform(AddExample("It snowed.", "Snow", TASK))
            assert len(agent.perform(FindExamples())) == 2
    finally:
        subprocess.run(["umount", str(home)], check=True)
