"""The endpoint of `perfit serve` in the agent: with many apps at once, and while it is locked."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tests.support.agents import SECRET, InThread, connected, running
from tests.support.device import Perfit
from tests.support.endpoint import App
from tests.support.fake_cloud import FakeCloud
from tests.support.waiting import wait_for

from perfit_device.agent.controls import Lock, Unlock
from perfit_device.openai_api.service import Serve, Serving
from perfit_device.operations.endpoint import EndpointToken
from perfit_device.operations.operation import Event
from perfit_device.settings import DeviceSettings


def answers(app: App) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(app.address) == 0


def test_the_agent_hosts_the_endpoint(ready: Perfit, home: Path) -> None:
    """Also through a lock and an unlock; it ends when its caller leaves, and the agent stays."""
    settings = DeviceSettings("default", home)
    said: list[Event] = []
    with running(settings), connected(settings) as caller, connected(settings) as other:
        serve = Serve("127.0.0.1", 0)
        with InThread(lambda: caller.perform(serve, said.append)) as served:
            wait_for(lambda: said, what="the endpoint")
            (serving,) = said
            assert isinstance(serving, Serving)
            assert serving.token == other.perform(EndpointToken()).text
            app = App(serving.url, serving.token)
            with ThreadPoolExecutor(6) as apps:
                assert {reply.status for reply in apps.map(lambda _: app.chat(), range(12))} == {200}
            other.perform(Lock())
            refused = app.chat()
            assert (refused.status, refused.error["code"]) == (503, "locked")
            assert refused.error["message"] == "locked: perfit unlock"
            other.perform(Unlock(SECRET.encode()))
            assert app.get("/models").status == 200
            caller.close()
        assert served.error is not None
        wait_for(lambda: not answers(app), what="the end of the endpoint")
        assert "unlocked" in ready.ok("agent", "status")


@pytest.mark.slow
@pytest.mark.parametrize("how", ["lock --now", "agent stop"])
def test_answers_under_way_say_that_it_is_locked(
    ready: Perfit, home: Path, cloud: FakeCloud, how: str
) -> None:
    """Whole ones by their status, streams by their last event; the command ends where the agent does."""
    cloud.answer, cloud.pause = "word " * 400, 0.05
    with running(DeviceSettings("default", home)):
        words = [sys.executable, "-m", "perfit_device.cli", "serve", "--port", "0", "--json"]
        with (
            subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process,
            contextlib.ExitStack() as failing,
        ):
            failing.callback(process.kill)  # its end is waited for
            assert process.stdout is not None and process.stderr is not None
            said = json.loads(process.stdout.readline())
            app = App(said["url"], said["token"])
            with InThread(app.chat) as whole, InThread(lambda: app.chat(stream=True)) as streamed:
                wait_for(lambda: cloud.calls.count("Generate") == 2)
                ready.ok(*how.split())
            assert whole.result.status == 503
            events = streamed.result.events if streamed.result.status == 200 else [streamed.result.json]
            told = {whole.result.error["message"], events[-1]["error"]["message"]}
            both = {"locked: perfit unlock", "perfit serve has stopped; start it again"}  # whichever is first
            assert told <= both if how == "agent stop" else told == {"locked: perfit unlock"}
            if how == "lock --now":
                assert answers(app)
                process.send_signal(signal.SIGINT)
                assert (process.wait(60), process.stderr.read()) == (0, "")
            else:
                assert process.wait(60) == 3
                assert json.loads(process.stderr.read())["error"] == {
                    "code": "unavailable",
                    "message": "perfit's agent stopped, and what it served with it; start it again",
                }


def test_what_it_needs_is_said_by_the_agent_too(ready: Perfit, home: Path) -> None:
    with running(DeviceSettings("default", home)):
        assert "no address of this machine" in ready.fails("serve", "--host", "nowhere.invalid")
