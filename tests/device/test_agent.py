"""A profile that its agent keeps open: every command works at it as it does without one, and at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tests.support.agents import SECRET, InThread, connected, running
from tests.support.device import Perfit
from tests.support.waiting import read_until, wait_for

from perfit_device.agent.controls import State
from perfit_device.agent.server import AgentServer
from perfit_device.cancellation import Cancellation, away, uninterrupted, wait_until_cancelled
from perfit_device.history import HistoryItem
from perfit_device.operations.ask import Ask, Question
from perfit_device.operations.examples import AddExample, FindExamples
from perfit_device.operations.forgetting import Forget
from perfit_device.operations.imports import ImportExamples
from perfit_device.operations.operation import Emit, Event, Note, Performer, Progress, Service
from perfit_device.operations.update import Update
from perfit_device.operations.versions import Undo
from perfit_device.profile import Profile
from perfit_device.settings import DeviceSettings
from perfit_device.vault.store import Vault
from perfit_shared.errors import Busy, Locked, PerfitError, UpdateFailed, VaultBusy
from perfit_shared.types import Mode

BASE = Ask(Question("The council met.", temperature=0.0), (Mode.BASE,))
SHORT = Update(settings={"epochs": 2}, checkpoint_seconds=0.0)
ANEW = Update(fresh=True, checkpoint_seconds=0.0)


@pytest.fixture
def settings(home: Path) -> DeviceSettings:
    return DeviceSettings("default", home)


@pytest.fixture
def agent(ready: Perfit, settings: DeviceSettings) -> Iterator[int]:
    with running(settings) as pid:
        yield pid


@pytest.fixture
def step(cloud: Any) -> Iterator[tuple[threading.Event, threading.Event]]:
    """(a gradient was asked for, let it come)."""
    begun, go_on = threading.Event(), threading.Event()

    def waiting(method: str) -> PerfitError | None:
        if method == "ComputeGradient":
            begun.set()
            assert go_on.wait(60)
        return None

    cloud.fail = waiting
    yield begun, go_on
    go_on.set()


def test_commands_do_the_same_at_an_agent(
    ready: Perfit, settings: DeviceSettings, history_file: Path, tmp_path: Path
) -> None:
    """Words, figures and files; the vault is the agent's meanwhile."""
    ready.ok("update", "--epochs", "2")
    ready.ok("evaluate")  # what it found is in the status from then on

    def day(name: str) -> list[object]:
        shift = tmp_path / name
        said: list[object] = [
            ready("ask", "x", "--mode", "base"),
            ready("ask", "x", "--compare"),
            ready("ask", "x", "--compare", "--json"),
            ready("ask", "x", "--json"),
            ready("ask", "much too long", "--mode", "base"),
            ready("ask", "x", "--task", "poems"),
            ready("ask", " "),
            ready("history", "import", str(history_file)),
            ready("history", "list", "--json"),
            ready("history", "forget", "abcd"),
            ready("undo", "--list"),
            ready("undo"),
            ready("status"),
            ready("evaluate", "--json"),
            ready("update", "--epochs", "2"),
            ready("export", "--shift", str(shift))[:2],
        ]
        data = shift.read_bytes()
        numbers = data[8 + int.from_bytes(data[:8], "little") :]  # what stands before is in no order
        return [*said, numbers, ready("evaluate", "--shift", str(shift))[:2]]

    alone = day("one.shift")
    with running(settings):
        with pytest.raises(VaultBusy):
            Vault.open(settings.vault_path, SECRET, wait_seconds=0.0)
        assert day("two.shift") == alone


def test_the_caller_s_default_task_is_meant(
    perfit: Perfit, settings: DeviceSettings, cloud: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The agent kept the config file and the variables of the day it started."""
    cloud.tasks = ["news_headline", "chat"]
    perfit.ok("enroll", cloud.invite().encode())
    with running(settings):
        assert "several tasks" in perfit.fails("ask", "x")
        perfit.ok("config", "set", "task", "news_headline")
        assert perfit.json("ask", "x")["task"] == "news_headline"
        monkeypatch.setenv("PERFIT_TASK", "chat")
        assert perfit.json("ask", "x")["task"] == "chat"


@pytest.mark.slow
def test_a_hundred_asks_lists_and_imports_go_on_while_an_update_trains(
    agent: int, cloud: Any, settings: DeviceSettings
) -> None:
    """Of four callers at once, and with a checkpoint after each step. None is refused."""
    cloud.fail = lambda method: time.sleep(0.02) if method == "ComputeGradient" else None
    endless, seen = Update(settings={"epochs": 1000}, checkpoint_seconds=0.0), list[Event]()

    def use(caller: int) -> None:
        with connected(settings) as mine:
            for n in range(25):
                assert mine.perform(BASE).by_mode[Mode.BASE].text == "Hello world base "
                item = HistoryItem("news_headline", {"text": f"New {caller} {n}.", "title": "N"})
                assert mine.perform(ImportExamples([item])).added == 1
                assert len(mine.perform(FindExamples())) > 20 + n

    trainer = connected(settings)
    with InThread(lambda: trainer.perform(endless, seen.append)) as training:
        wait_for(lambda: any(isinstance(event, Progress) for event in seen) or training.error)
        before = len(seen)
        with ThreadPoolExecutor(4) as callers:
            assert list(callers.map(use, range(4))) == [None] * 4
        assert len(seen) > before and training.error is None, "it trained meanwhile"
        trainer.close()
    with connected(settings) as other:
        assert len(other.perform(FindExamples())) == 120


@pytest.mark.slow
def test_an_update_trains_on_the_history_that_it_read(
    agent: int, cloud: Any, settings: DeviceSettings, step: tuple[threading.Event, threading.Event]
) -> None:
    begun, go_on = step
    seen: list[Event] = []
    with InThread(lambda: connected(settings).perform(SHORT, seen.append)) as training:
        assert begun.wait(60)
        with connected(settings) as other:
            for n in range(3):
                assert other.perform(BASE).by_mode[Mode.BASE].text == "Hello world base "
                item = HistoryItem("news_headline", {"text": f"New {n}.", "title": "N"})
                added = other.perform(ImportExamples([item]))
                assert added.added == 1
                assert len(other.perform(FindExamples())) == 21 + n
            with pytest.raises(Busy, match="running already"):
                other.perform(SHORT)
        go_on.set()
    assert training.error is None and training.result.trained.examples == 16, "of the history that it read"
    assert [event.done for event in seen if isinstance(event, Progress)][-1] == training.result.trained.steps
    with connected(settings) as other:
        assert other.perform(SHORT).trained.examples > 16, "what came meanwhile is new"


def test_without_an_agent_an_update_takes_the_vault_only_to_read_and_to_write(
    ready: Perfit, cloud: Any, settings: DeviceSettings, step: tuple[threading.Event, threading.Event]
) -> None:
    begun, go_on = step

    def update() -> Any:
        with Profile.open(settings, passphrase=lambda: SECRET) as profile:
            return profile.perform(SHORT)

    with InThread(update) as training:
        assert begun.wait(60)
        ready.ok("history", "add", "It rained.", "Rain")
        assert ready.ok("ask", "x", "--mode", "base") == "Hello world base \n"
        assert "running already" in ready.fails("update", code=3)
        go_on.set()
    assert training.error is None and training.result.trained.gate.accepted
    assert ready.json("status")["tasks"]["news_headline"]["examples"] == 21


@pytest.mark.slow
@pytest.mark.parametrize("what", ["forget", "undo"])
def test_an_update_leaves_nothing_of_what_was_taken_back_meanwhile(
    agent: int, settings: DeviceSettings, step: tuple[threading.Event, threading.Event], what: str
) -> None:
    begun, go_on = step
    with connected(settings) as other:
        if what == "undo":
            go_on.set()
            other.perform(SHORT)
            other.perform(Update(settings={"epochs": 3}))
            begun.clear()
            go_on.clear()
        items = other.perform(FindExamples())
        with InThread(lambda: connected(settings).perform(ANEW)) as training:
            assert begun.wait(60)
            other.perform(Forget([items[0].name]) if what == "forget" else Undo())
            go_on.set()
    assert isinstance(training.error, UpdateFailed) and "starts anew" in str(training.error)
    with Perfit_vault(settings) as vault:
        assert vault.list("checkpoint") == {} and vault.list("finished") == {}
        assert len(vault.list("version")) == (0 if what == "forget" else 2)


class Perfit_vault:  # noqa: N801
    """The vault of an agent that is stopped for it."""

    def __init__(self, settings: DeviceSettings) -> None:
        from perfit_device.agent.controls import Lock

        with connected(settings) as agent:
            agent.perform(Lock())
        self._vault = Vault.open(settings.vault_path, SECRET)

    def __enter__(self) -> Vault:
        return self._vault

    def __exit__(self, *_: object) -> None:
        self._vault.close()


def test_a_caller_who_leaves_ends_the_call_to_the_cloud(
    agent: int, cloud: Any, settings: DeviceSettings
) -> None:
    """Also while nothing comes from it."""
    held = threading.Event()
    cloud.fail = lambda method: held.wait(60) and None if method == "Generate" else None
    cloud.pause = 0.2
    other = connected(settings)
    with InThread(lambda: other.perform(BASE)) as asking:
        wait_for(lambda: "Generate" in cloud.calls)
        other.close()
        wait_for(lambda: asking.error is not None)
        with connected(settings) as another:
            wait_for(lambda: another.perform(State()).running == 0, what="the end at the agent")
        held.set()
        wait_for(cloud.cancelled.is_set, what="the end of the answer")
    with connected(settings) as other:
        cloud.pause = 0.0
        assert other.perform(BASE).by_mode[Mode.BASE].text == "Hello world base "


@pytest.mark.slow
def test_ctrl_c_ends_an_update_and_not_the_agent(
    agent: int, cloud: Any, ready: Perfit, settings: DeviceSettings
) -> None:
    cloud.fail = lambda method: time.sleep(0.05)
    words = [sys.executable, "-m", "perfit_device.cli", "update", "--epochs", "16"]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    said = read_until(process.stderr, "loss")
    process.send_signal(signal.SIGINT)
    said += process.stderr.read()
    assert process.wait(60) == 130
    assert "stopped after step" in said and "the same command resumes there" in said
    cloud.fail = lambda method: None
    assert ready.json("update", "--epochs", "16")["resumed_from"] > 0
    with connected(settings) as other:
        assert other.hello.pid == agent


def test_passphrases_change_at_an_agent(agent: int, ready: Perfit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERFIT_NEW_PASSPHRASE", "battery staple")
    monkeypatch.setenv("PERFIT_PASSPHRASE", "wrong")
    assert "wrong passphrase" in ready.fails("passphrase", code=6)
    monkeypatch.setenv("PERFIT_PASSPHRASE", SECRET)
    ready.ok("passphrase")
    ready.ok("agent", "stop")
    assert "wrong passphrase" in ready.fails("status", code=6)
    monkeypatch.setenv("PERFIT_PASSPHRASE", "battery staple")
    ready.ok("status")


def test_the_enrolment_of_another_cloud_ends_the_old_channel(agent: int, ready: Perfit, cloud: Any) -> None:
    ready.ok("ask", "x", "--mode", "base")
    other = type(cloud)()
    try:
        ready.ok("enroll", other.invite().encode(), "--replace")
        ready.ok("ask", "x", "--mode", "base")
        assert "Generate" in other.calls
    finally:
        other.stop()


def test_adding_needs_no_cloud(agent: int, cloud: Any, settings: DeviceSettings) -> None:
    cloud.stop()
    with connected(settings) as other:
        assert other.perform(AddExample("It rained.", "Rain")).added == 1


def test_a_cloud_that_comes_back_is_used_again(agent: int, ready: Perfit, cloud: Any) -> None:
    """As after the minute in which it closes a channel that nobody uses."""
    ready.ok("ask", "x", "--mode", "base")
    cloud.stop()
    assert "cannot reach the cloud" in ready("status")[1]
    cloud.start()
    assert ready.ok("ask", "x", "--mode", "base") == "Hello world base \n"


def test_a_service_is_attached_and_performs_at_the_agent(ready: Perfit, settings: DeviceSettings) -> None:
    """An operation that runs until its caller leaves, also through a lock and an unlock."""
    server = AgentServer(settings, idle_seconds=0, log=lambda _: None)
    cancellation, said = Cancellation(), []
    with InThread(lambda: server.perform_for(cancellation, Endpoint(), said.append)) as serving:
        wait_for(lambda: len(said) == 1)
        assert said == [Note("Locked")] and server.is_locked
        cancellation.cancel()
    assert isinstance(serving.error, KeyboardInterrupt)


def test_an_agent_that_stops_waits_for_whoever_it_answers(ready: Perfit, settings: DeviceSettings) -> None:
    said: list[str] = []
    server = AgentServer(settings, idle_seconds=0, log=said.append)
    answering = server.answering()
    answering.__enter__()
    with InThread(server._end):
        wait_for(lambda: server._is_free._waiters or said)  # type: ignore[attr-defined]
        assert not said
        answering.__exit__(None, None, None)
    assert said == ["stopped"]


@dataclass(frozen=True)
class Endpoint(Service[None]):
    def serve(self, performer: Performer, emit: Emit) -> None:
        try:
            performer.perform(FindExamples())
        except Locked as error:
            emit(Note(type(error).__name__))
        wait_until_cancelled()


def test_a_wait_elsewhere_is_interrupted_here() -> None:
    assert away(threading.current_thread) is not threading.main_thread()
    with pytest.raises(Busy, match="later"):
        away(_busy)
    go_on = threading.Event()
    threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        away(go_on.wait)
    go_on.set()


def _busy() -> None:
    raise Busy("later")


def test_what_interrupts_waits_for_the_end_of_a_short_block() -> None:
    """Between a call's start and its thread's, Ctrl-C left a channel that could not be closed."""
    done = []
    with pytest.raises(KeyboardInterrupt), uninterrupted():
        os.kill(os.getpid(), signal.SIGINT)
        done.append("the block")
    assert done == ["the block"]
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("signals interrupt at once again")


def test_a_signal_while_signals_come_back_leaves_none_deaf(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C at that moment left nobody to hear SIGTERM and SIGHUP for the rest of the command."""
    heard: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: heard.append(number))
    back = signal.signal

    def interrupted(number: int, handler: Any) -> Any:
        found = back(number, handler)
        if number == signal.SIGINT:
            signal.raise_signal(signal.SIGINT)
        return found

    try:
        with pytest.raises(KeyboardInterrupt), uninterrupted():
            monkeypatch.setattr(signal, "signal", interrupted)
        monkeypatch.undo()
        signal.raise_signal(signal.SIGTERM)
        assert heard == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)
