"""Agents in processes of their own, and what tests do at them."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

from perfit_device.agent import client, launch
from perfit_device.agent.client import AgentClient
from perfit_device.agent.controls import Stop
from perfit_device.settings import DeviceSettings
from perfit_shared.errors import PerfitError
from tests.support.waiting import wait_for

SECRET = "correct horse"  # of the fixture `home`


def connected(settings: DeviceSettings) -> AgentClient:
    agent = client.connect(settings)
    assert agent is not None, "no agent answers"
    return agent


@contextlib.contextmanager
def running(settings: DeviceSettings, passphrase: str | None = SECRET, **more: Any) -> Iterator[int]:
    """An agent; its process id."""
    launch.start(settings, passphrase, **more)
    with connected(settings) as agent:
        pid = agent.hello.pid
    try:
        yield pid
    finally:
        with contextlib.suppress(PerfitError, AssertionError), connected(settings) as agent:
            agent.perform(Stop())
        wait_for(lambda: has_ended(pid), what="the agent's end")


def kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    wait_for(lambda: has_ended(pid), what="its death")


def has_ended(pid: int) -> bool:
    """Ours are children of this process: nobody else collects them."""
    with contextlib.suppress(ChildProcessError):
        return os.waitpid(pid, os.WNOHANG)[0] == pid
    return True


class InThread:
    """What a call comes to in another thread; use `with`, which waits for its end."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self.result: Any = None
        self.error: BaseException | None = None
        self._call = call
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> InThread:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.join(60)
        assert not self._thread.is_alive()

    def _run(self) -> None:
        try:
            self.result = self._call()
        except BaseException as error:
            self.error = error
