"""One command on a copy of a device, killed when it likes or not at all."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from local import Device
from soak.killing.agents import agent_of
from soak.killing.child import start

__all__ = ["Run", "copy_of", "run_command"]


@dataclass
class Run:
    """What a child told."""

    steps: dict[int, float] = field(default_factory=dict)  # step → when it was done
    opened: float = 0.0
    ended: float = 0.0
    done: bool = False

    @property
    def seconds(self) -> float:
        """From opening its vault to its end."""
        return self.ended - self.opened

    @property
    def longest_step(self) -> float:
        times = list(self.steps.values())
        return max((b - a for a, b in itertools.pairwise(times)), default=0.0)


def run_command(
    device: Device, arguments: list[str], *, kill_after: float | None = None, victim: str = ""
) -> Run:
    """The command in a process of its own, killed so many seconds after it opened its vault.

    `victim`: with an agent; then the agent is killed, or the command, its caller.
    """
    told, timer = Run(), None
    with (
        agent_of(device) if victim else nullcontext(0) as agent,
        start("command", *arguments, env=device.env) as child,
    ):
        doomed = agent if victim == "agent" else child.pid
        for line in child.stdout or ():
            word, *rest = line.split()
            if word == "opened" and not told.opened:
                told.opened = time.monotonic()
                if kill_after is not None:
                    timer = threading.Timer(kill_after, os.kill, [doomed, signal.SIGKILL])
                    timer.start()
            elif word == "step" and len(rest) == 2 and line.endswith("\n"):
                told.steps[int(rest[0])] = float(rest[1])
            told.done = told.done or line == "done\n"
        told.ended = time.monotonic()
        if timer is not None:
            timer.cancel()
    return told


@contextmanager
def copy_of(template: Device | None, home: Path, **env: str) -> Iterator[Device]:
    """A copy of a device, or one that has no profile yet; gone behind the block."""
    device = Device(home, "default")
    device.env.update(env)
    place = Path(device.env["PERFIT_HOME"])
    if template is not None:
        shutil.copytree(template.env["PERFIT_HOME"], place)
    try:
        yield device
    finally:
        shutil.rmtree(place, ignore_errors=True)
