"""A device's agent, which a kill may end before its block does."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from local import PASSPHRASE, Device
from perfit_device.agent import client, launch
from perfit_device.settings import DeviceSettings

__all__ = ["agent_of", "settings_of"]


def settings_of(device: Device) -> DeviceSettings:
    return DeviceSettings(device.profile, Path(device.env["PERFIT_HOME"]))


@contextmanager
def agent_of(device: Device) -> Iterator[int]:
    """Its process id. It has ended behind the block."""
    settings = settings_of(device)
    launch.start(settings, PASSPHRASE)
    agent = client.connect(settings)
    if agent is None:
        raise RuntimeError("the agent is gone")
    agent.close()
    try:
        yield agent.hello.pid
    finally:
        launch.stop(settings)
        os.waitpid(agent.hello.pid, 0)  # it is a child of this process
