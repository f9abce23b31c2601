"""The agent's process: locks, callers that mean no good, and that there is one."""

from __future__ import annotations

import ctypes
import os
import random
import shutil
import signal
import socket
import sys
import time
from multiprocessing.connection import Client
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.support.agents import SECRET, InThread, connected, kill, running
from tests.support.device import Perfit
from tests.support.waiting import wait_for

from perfit_device.agent import client, codec, launch
from perfit_device.agent.address import FAMILY, address_of
from perfit_device.agent.controls import Lock, State, Unlock
from perfit_device.operations.examples import AddExample, FindExamples
from perfit_device.operations.update import Update
from perfit_device.settings import DeviceSettings
from perfit_device.vault.store import Vault
from perfit_shared.errors import Busy, Locked, PerfitError, Unavailable, WrongPassphrase

TASK = "news_headline"
SLOW = Update(settings={"epochs": 40}, checkpoint_seconds=0.0)


@pytest.fixture
def settings(home: Path) -> DeviceSettings:
    return DeviceSettings("default", home)


@pytest.fixture
def made(settings: DeviceSettings) -> DeviceSettings:
    """Not enrolled."""
    Vault.create(settings.vault_path, SECRET).close()
    return settings


def log_of(settings: DeviceSettings) -> str:
    return settings.vault_path.with_name("agent.log").read_text("utf-8")


# -- locked ----------------------------------------------------------------------------------------


def test_a_locked_agent_has_nothing(
    made: DeviceSettings, perfit: Perfit, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(made), connected(made) as agent:
        agent.perform(AddExample("It rained.", "Rain", TASK))
        assert "locked" in perfit.ok("lock")
        with pytest.raises(Locked, match="`perfit unlock` opens it"):
            agent.perform(FindExamples())
        with Vault.open(made.vault_path, SECRET, wait_seconds=0.0) as vault:
            assert len(vault.list("example")) == 1, "it left the file"
        for wrong in (b"wrong", b"\xff", None):
            with pytest.raises(WrongPassphrase):
                agent.perform(Unlock(wrong))
        assert perfit.json("history", "list")[0]["fields"]["title"] == "Rain", "by this process"
        monkeypatch.delenv("PERFIT_PASSPHRASE")
        assert "the profile is locked" in perfit.fails("history", "list", code=6)
        monkeypatch.setenv("PERFIT_PASSPHRASE", SECRET)
        assert not perfit.json("unlock")["is_locked"]
        assert len(agent.perform(FindExamples())) == 1
        os.kill(agent.hello.pid, signal.SIGTERM)


@pytest.mark.skipif(sys.platform != "linux", reason="threads are named by tgkill")
def test_a_signal_that_another_thread_gets_ends_it_too(made: DeviceSettings) -> None:
    """The main thread waited for connections on, and the update beside it ran to its end."""
    with running(made) as pid:
        others = {int(task.name) for task in Path(f"/proc/{pid}/task").iterdir()} - {pid}
        assert ctypes.CDLL(None).tgkill(pid, max(others), signal.SIGTERM) == 0
        wait_for(lambda: Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z", what="its end")


def test_unused_for_long_it_locks_itself(made: DeviceSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERFIT_AGENT_LOCK_MINUTES", "0.005")
    with running(DeviceSettings.from_environment(None)), connected(made) as agent:
        wait_for(lambda: agent.perform(State()).is_locked)
        with pytest.raises(Locked):
            agent.perform(FindExamples())


@pytest.mark.slow
def test_an_update_holds_it_open_to_its_own_end(ready: Perfit, cloud: Any, settings: DeviceSettings) -> None:
    cloud.fail = lambda method: time.sleep(0.02)
    with running(settings), connected(settings) as agent:
        short = Update(settings={"epochs": 4})
        with InThread(lambda: connected(settings).perform(short)) as training:
            wait_for(lambda: "ComputeGradient" in cloud.calls)
            state = agent.perform(Lock())
            assert state.is_locked and state.running == 1
            with pytest.raises(Locked):
                agent.perform(FindExamples())
        assert training.error is None and training.result.trained.steps > 0
        wait_for(lambda: agent.perform(State()).running == 0)
        with Vault.open(settings.vault_path, SECRET) as vault:
            assert vault.list("finished")


@pytest.mark.slow
@pytest.mark.parametrize("how", ["lock --now", "SIGTERM"])
def test_what_stops_an_update_leaves_its_checkpoint(
    ready: Perfit, cloud: Any, settings: DeviceSettings, how: str
) -> None:
    cloud.fail = lambda method: time.sleep(0.02)
    slow = Update(settings={"epochs": 40}, checkpoint_seconds=1000.0)
    with running(settings) as pid:
        with InThread(lambda: connected(settings).perform(slow)) as training:
            wait_for(lambda: cloud.calls.count("ComputeGradient") > 10)
            if how == "SIGTERM":
                os.kill(pid, signal.SIGTERM)
            else:
                ready.ok("lock", "--now")
        assert isinstance(training.error, Unavailable)
    with Vault.open(settings.vault_path, SECRET) as vault:
        assert vault.list("checkpoint")


# -- who else may call -----------------------------------------------------------------------------


def test_junk_ends_its_own_connection_alone(made: DeviceSettings) -> None:
    rng = random.Random(5)
    address = address_of(made)
    with running(made), connected(made) as agent:
        agent.perform(AddExample("It rained.", "SECRETWORD", TASK))
        call = codec.encode(codec.call_of(FindExamples()))
        named = [
            codec.encode(codec.Call(name, msgspec.Raw(b"\x80")))
            for name in (
                "os.system",
                "operations.examples.os",
                "operations.nope.X",
                "agent.server.AgentServer",
            )
        ]
        frames = [
            b"",
            b"\xc1",
            bytes(1000),
            call[:-1],
            call + b"x",
            *named,
            codec.encode(codec.Done(msgspec.Raw(b"\xc0"))),
        ]
        frames += [rng.randbytes(rng.randrange(1, 200)) for _ in range(30)]
        for _ in range(60):
            damaged = bytearray(call)
            damaged[rng.randrange(len(call))] = rng.randrange(256)
            frames.append(bytes(damaged))
        for frame in frames:
            with Client(address, FAMILY) as other:
                other.recv_bytes()
                other.send_bytes(frame)
        for raw in (
            b"",
            b"\x00",
            b"\x7f\xff\xff\xff",
            b"\xff\xff\xff\xff" + b"\x7f" * 8,
            b"\x00\x00\x00\x09abc",
        ):
            with socket.socket(socket.AF_UNIX) as plain:
                plain.connect(address)
                plain.sendall(raw)
        assert len(agent.perform(FindExamples())) == 1
        with Client(address, FAMILY) as other:  # two at once
            other.recv_bytes()
            slow = codec.encode(codec.call_of(FindExamples()))
            for _ in range(50):
                other.send_bytes(slow)
        assert len(agent.perform(FindExamples())) == 1
    said = log_of(made)
    assert "SECRETWORD" not in said and "rained" not in said and "Traceback" not in said


def test_there_is_a_bound_on_connections(made: DeviceSettings) -> None:
    with running(made):
        held = [Client(address_of(made), FAMILY) for _ in range(70)]
        wait_for(lambda: sum(one.poll() for one in held) == 70)
        refused = [
            one
            for one in held
            if isinstance(codec.decode(one.recv_bytes(), codec.Hello, codec.Failed), codec.Failed)
        ]
        assert len(refused) >= 6
        for one in held:
            one.close()
        wait_for(lambda: answers(made))


def answers(settings: DeviceSettings) -> bool:
    try:
        with connected(settings) as agent:
            return agent.perform(State()).pid > 0
    except PerfitError:
        return False


# -- one of them ----------------------------------------------------------------------------------


def test_there_is_one_agent_of_a_profile(made: DeviceSettings, perfit: Perfit) -> None:
    with running(made) as pid:
        with pytest.raises(Busy, match="runs already"):
            launch.start(made, SECRET)
        assert perfit.json("agent", "start")["pid"] == pid
        assert perfit.json("agent", "status")["pid"] == pid
        perfit.ok("agent", "stop")
        assert perfit.json("agent", "status") == {"agent": False}
        assert "no agent of this profile runs" in perfit.fails("lock")
        assert not Path(address_of(made)).exists()


def test_a_wrong_passphrase_starts_none(made: DeviceSettings) -> None:
    with pytest.raises(WrongPassphrase):
        launch.start(made, "wrong")
    assert client.connect(made) is None


def test_a_socket_that_a_kill_left_is_replaced(made: DeviceSettings, perfit: Perfit) -> None:
    with running(made) as pid:
        kill(pid)
        assert Path(address_of(made)).exists()
        assert perfit.json("history", "list") == [], "without an agent"
        with running(made):
            assert answers(made)


def test_a_deep_home_has_its_socket_elsewhere(
    tmp_path: Path, cheap_vaults: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / ("deep" * 20) / ("er" * 40)
    monkeypatch.setenv("PERFIT_HOME", str(home))
    settings = DeviceSettings("default", home)
    Vault.create(settings.vault_path, SECRET).close()
    with running(settings):
        address = Path(address_of(settings))
        assert len(str(address)) < 100 and address.parent.stat().st_mode & 0o777 == 0o700
        assert answers(settings)
        address.parent.chmod(0o755)
        with pytest.raises(PerfitError, match="yours alone"):
            address_of(settings)
        address.parent.chmod(0o700)


@pytest.mark.parametrize("depth", [0, 40], ids=["socket beside the vault", "socket elsewhere"])
def test_an_agent_ends_when_its_profile_is_gone(
    depth: int, tmp_path: Path, cheap_vaults: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PERFIT_AGENT_LOCK_MINUTES", "0.01")
    monkeypatch.setenv("PERFIT_HOME", str(tmp_path / ("deep" * depth)))
    settings = DeviceSettings.from_environment(None)
    Vault.create(settings.vault_path, SECRET).close()
    with running(settings) as pid:
        shutil.rmtree(settings.home)
        wait_for(
            lambda: not Path(f"/proc/{pid}/cmdline").exists() or not Path(f"/proc/{pid}/cmdline").read_bytes()
        )


def test_an_agent_that_nobody_can_reach_ends(made: DeviceSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever tidies /tmp removes a socket there, and the vault stays."""
    monkeypatch.setenv("PERFIT_AGENT_LOCK_MINUTES", "0.01")
    with running(DeviceSettings.from_environment(None)):
        Path(address_of(made)).unlink()
        wait_for(lambda: log_of(made).endswith("stopped\n"))
    Vault.open(made.vault_path, SECRET, wait_seconds=0.0).close()
