"""Updates that nobody asks for, through real processes: a tiny cloud, `perfit update --auto`, an agent.

The machine that they look at is one that a test makes up, in a file: another one may be busy.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.support.waiting import read_until

import tiny
from local import PASSPHRASE, Device, LocalCloud
from perfit_device.settings import DeviceSettings
from perfit_device.vault.store import Vault

pytestmark = pytest.mark.slow
TASK = "news_headline"
IDLE = {"load": 0.1, "on_battery": False, "free": 1 << 40, "days": 0}
# The command line, or an agent, on the machine of the file MACHINE, whose clock is days off.
PROGRAM = """
import json, os, sys
from datetime import datetime, timedelta
from perfit_device import machine
from perfit_device.operations import automatic

def now():
    return json.load(open(os.environ["MACHINE"]))

def look(folder):
    on = now()
    return machine.Machine(4, on["load"], machine.Power(on["on_battery"], 50), on["free"])

class Clock(datetime):
    @classmethod
    def now(cls, zone=None):
        return datetime.now(zone) + timedelta(days=now()["days"])

machine.look, automatic.datetime = look, Clock
if sys.argv[1] == "agent":
    from perfit_device.agent.__main__ import main
    del sys.argv[1]
    sys.exit(main())
sys.argv[0] = "perfit"
from perfit_device.cli.main import run
run()
"""


@pytest.fixture(scope="module")
def cloud(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCloud]:
    folder = tmp_path_factory.mktemp("cloud")
    made = tiny.build(folder / "tiny")
    with LocalCloud(made.model, made.artefacts[:1], folder / "state") as cloud:
        yield cloud


class Machine:
    """One device, and the machine that it believes to be on."""

    def __init__(self, cloud: LocalCloud, folder: Path) -> None:
        self.device = Device(folder / "home", "default")
        self.device("enroll", "-", text=cloud.invite())
        self.settings = DeviceSettings("default", folder / "home")
        self._folder, self._count = folder, 0
        self.env = {**os.environ, **self.device.env, "MACHINE": str(folder / "machine.json")}
        self.set()
        self.learn(30)

    def set(self, **changes: Any) -> None:
        (self._folder / "machine.json").write_text(json.dumps(IDLE | changes))

    def learn(self, count: int) -> None:
        """So many new examples."""
        lines = tiny.headlines(self._count + count)[self._count :]
        self._count += count
        file = self._folder / "more.jsonl"
        file.write_text("\n".join(map(json.dumps, lines)))
        self.device("history", "import", str(file), "--task", TASK)

    def start(self, *words: str, **more: Any) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", PROGRAM, *words]
        return subprocess.Popen(command, env=self.env, stderr=subprocess.PIPE, text=True, **more)

    def decided(self) -> str:
        """What it says of the task."""
        with self.start("update", "--auto") as process:
            said = process.stderr.read() if process.stderr else ""
        assert process.returncode == 0, said
        return said.splitlines()[-1]

    def updates(self) -> int:
        """That ended."""
        with Vault.open(self.settings.vault_path, PASSPHRASE) as vault:
            return sum(len(json.loads(data)) for data in vault.list("updates").values())


@pytest.fixture
def mine(cloud: LocalCloud, tmp_path: Path) -> Machine:
    return Machine(cloud, tmp_path)


def test_it_says_why_not_and_trains_once(mine: Machine) -> None:
    for changes, why in (
        ({"on_battery": True}, "the machine runs on its battery"),
        ({"free": 1 << 20}, "the disk has 1 MiB free"),
        ({"load": 3.9}, "the machine is busy (load 3.9 on 4 cores)"),
        ({"days": -3000}, "before your certificate"),
        ({"days": 3000}, "and your certificate ended"),
    ):
        mine.set(**changes)
        assert why in mine.decided()
    assert mine.updates() == 0
    mine.set()
    assert "trained" in mine.decided() and mine.updates() == 1
    assert "nothing is new" in mine.decided() and mine.updates() == 1
    mine.learn(10)
    assert "less than an hour ago" in mine.decided()
    mine.set(days=1)
    assert "trained" in mine.decided() and mine.updates() == 2


@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGHUP])
def test_what_ends_it_leaves_a_checkpoint(mine: Machine, ending: signal.Signals) -> None:
    with mine.start("update", "--auto") as process:
        assert process.stderr is not None
        said = read_until(process.stderr, "left")
        process.send_signal(ending)
        said += process.stderr.read()
    assert re.search(r"step \d+/\d+  loss [\d.]+  [\d.]+/s  [\d.:]+ (s|min|h) left", said), said
    assert process.returncode == 128 + ending
    assert "stopped after step" in said and mine.updates() == 0
    with mine.start("update", "--auto") as process:
        said = process.stderr.read() if process.stderr else ""
    assert "resuming after step" in said and mine.updates() == 1


def test_an_agent_trains_before_its_idle_lock_and_never_twice(mine: Machine) -> None:
    def log(until: str = " locked\n") -> str:
        """Of an agent until it has locked itself, which it does before it trains, or further."""
        words = ("agent", "default", "--idle-seconds", "0.5", "--unlock", "stdin")
        with mine.start(*words, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as agent:
            assert agent.stdin is not None and agent.stderr is not None
            agent.stdin.write(PASSPHRASE)
            agent.stdin.close()
            said = read_until(agent.stderr, until)
            agent.terminate()
            return said + agent.stderr.read()

    mine.set(on_battery=True)
    assert "trained" not in log()
    mine.set()
    assert " locked\n" in log(until="trained by itself") and mine.updates() == 1
    assert "trained" not in log() and mine.updates() == 1
