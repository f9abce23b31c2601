"""An agent that nobody asks: it trains what is due, by its timer and before its idle lock."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.support.agents import SECRET
from tests.support.device import Perfit

from perfit_device import machine
from perfit_device.agent import server as agent_server
from perfit_device.agent.server import AgentServer
from perfit_device.agent.timer import Timer
from perfit_device.machine import Machine, Power
from perfit_device.operations.examples import FindExamples
from perfit_device.settings import DeviceSettings
from perfit_shared.errors import Locked, PerfitError

IDLE_SECONDS = 900.0
IDLE = Machine(cores=4, load=0.1, power=Power(on_battery=False), free=1 << 40)


class Clock:
    now = 0.0


class Agent:
    """A server in this process, and its timer."""

    def __init__(self, clock: Clock, passphrase: bytes | None = SECRET.encode()) -> None:
        self.clock, self.log = clock, list[str]()
        settings = DeviceSettings.from_environment(None)
        self.server = AgentServer(settings, idle_seconds=IDLE_SECONDS, log=self.log.append)
        self.server.unlock(passphrase)
        self.timer = Timer(self.server, now=lambda: clock.now, log=self.log.append)

    def look(self, at: float) -> list[str]:
        """Whatever it does at this second; what it logs."""
        self.clock.now = at
        self.log.clear()
        self.timer.look()
        self.timer.wait()
        return list(self.log)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(agent_server, "_now", lambda: clock.now)
    monkeypatch.setattr(machine, "look", lambda folder: IDLE)
    return clock


@pytest.fixture
def stored_keys(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """An OS keyring."""
    stored: dict[str, str] = {}
    monkeypatch.setattr("keyring.set_password", lambda service, name, key: stored.update({name: key}))
    monkeypatch.setattr("keyring.get_password", lambda service, name: stored.get(name))
    yield stored


def test_its_timer_trains_and_puts_off_no_idle_lock(ready: Perfit, clock: Clock, cloud: Any) -> None:
    agent = Agent(clock)
    cloud.calls.clear()
    assert agent.look(599) == [] and not cloud.calls
    assert agent.look(600) == ["trained by itself: accepted"]
    assert "ComputeGradient" in cloud.calls and not agent.server.is_locked
    cloud.calls.clear()
    assert agent.look(899) == [] and not agent.server.is_locked
    assert agent.look(900) == ["locked"]
    assert agent.look(2000) == [] and not cloud.calls, "locked, it trains nothing"


def test_an_update_before_the_idle_lock_is_its_last(ready: Perfit, clock: Clock, cloud: Any) -> None:
    """It holds the vault open to its own end, and nobody else gets in."""
    agent = Agent(clock)
    begun, go_on = threading.Event(), threading.Event()

    def waiting(method: str) -> PerfitError | None:
        if method == "ComputeGradient":
            begun.set()
            assert go_on.wait(60)
        return None

    cloud.fail = waiting
    clock.now = 600
    agent.server.perform(FindExamples())
    agent.timer._last, clock.now = 1400, 1500
    agent.timer.look()
    assert begun.wait(60)
    assert agent.server.state().running == 1
    with pytest.raises(Locked):
        agent.server.perform(FindExamples())
    go_on.set()
    agent.timer.wait()
    assert agent.log[-2:] == ["locked", "trained by itself: accepted"]


def test_a_stop_ends_it_with_a_checkpoint(ready: Perfit, clock: Clock, cloud: Any) -> None:
    agent = Agent(clock)
    begun = threading.Event()

    def begin(method: str) -> PerfitError | None:
        if cloud.calls.count("ComputeGradient") > 20:
            begun.set()
            threading.Event().wait(0.05)
        return None

    cloud.fail = begin
    clock.now = 600
    agent.timer.look()
    assert begun.wait(60)
    agent.server.lock(now=True)
    agent.timer.wait()
    assert agent.log[-1].startswith("an update by itself ended: KeyboardInterrupt")
    assert agent.server.is_locked
    assert ready.json("status")["tasks"]["news_headline"]["half_done"]


def test_it_can_be_turned_off(ready: Perfit, clock: Clock, cloud: Any) -> None:
    ready.ok("config", "set", "update.auto", "false")
    assert ready.ok("config", "get", "update.auto") == "false\n"
    assert "should be true or false" in ready.fails("config", "set", "update.auto", "no")
    agent = Agent(clock)
    cloud.calls.clear()
    assert agent.look(600) == []
    assert agent.look(900) == ["locked"]
    assert not cloud.calls


@pytest.mark.parametrize("allowed", [True, False])
def test_a_locked_one_unlocks_itself_by_leave_alone(
    perfit: Perfit, clock: Clock, cloud: Any, history_file: Path, stored_keys: dict[str, str], allowed: bool
) -> None:
    perfit.ok("enroll", cloud.invite().encode(), "--keyring")
    perfit.ok("history", "import", str(history_file), "--offline")
    perfit.ok("config", "set", "update.unlock_by_keyring", str(allowed))
    agent = Agent(clock, None)
    agent.server.lock()
    assert agent.server.is_locked and stored_keys
    done = agent.look(600)
    assert done == (["unlocked", "locked", "trained by itself: accepted"] if allowed else [])
    assert agent.server.is_locked


def test_a_cloud_that_leaves_ends_it(ready: Perfit, clock: Clock, cloud: Any) -> None:
    agent = Agent(clock)
    agent.server.perform(FindExamples())
    cloud.stop()
    assert agent.look(900) == ["locked"], "it decided, found no cloud, and locked itself all the same"
