"""What an agent costs and saves: time to the first token of `perfit ask`, and its memory.

    python scripts/bench/agent.py --json docs/results/bench/agent.json

The cloud is that of device.py, for shifts of 786k numbers at Llama-2-7B's width. Times are medians, in ms:
of the cloud alone (a call on an open channel, to its first token), of an operation at the agent with a
connection of its own, and of the whole command `perfit ask`, at an agent and from a passphrase without
one. The command's time has Python's start in it, which the first two have not. What each adds is its
median less the cloud's. Memory is the agent's proportional set size, in 10⁶ bytes: after the asks, with the
endpoint of `perfit serve` once an app has asked it, and the median and the highest moment while it runs an
update. The 95th percentile of whole asks at the agent, of 16 tokens, comes last: of an idle profile, and
while it runs an update; each ask has to be answered.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import tempfile
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from threading import Thread
from typing import Any

import common
import device as devices

import tiny
from local import BIN, PASSPHRASE, Device
from perfit_device.agent import client, launch
from perfit_device.agent.client import AgentClient
from perfit_device.agent.controls import Stop
from perfit_device.history import HistoryItem
from perfit_device.openai_api.service import Serve, Serving
from perfit_device.operations.ask import AnswerPart, Ask, Question, prepare
from perfit_device.operations.imports import ImportExamples
from perfit_device.operations.operation import Event, Progress
from perfit_device.operations.update import Update
from perfit_device.profile import Profile
from perfit_device.settings import DeviceSettings
from perfit_shared.errors import Unavailable
from perfit_shared.presets import preset_for
from perfit_shared.tasks import TASKS
from perfit_shared.types import Mode

_TEXT = "The council met until dawn."
_POLL_SECONDS = 0.05


@dataclass(frozen=True)
class Sizes:
    hidden_size: int
    asks: int  # of each kind
    beside: int  # asks of which a percentile is taken
    epochs: int  # of the update
    rest: float  # seconds before the idle memory is read


FULL = Sizes(hidden_size=4096, asks=31, beside=100, epochs=30, rest=5.0)
SMALL = Sizes(hidden_size=256, asks=3, beside=5, epochs=2, rest=0.5)


def main() -> None:
    args = common.parser(__doc__).parse_args()
    sizes = SMALL if args.small else FULL
    spec = preset_for("news_categorize").spec(blocks=4, hidden_size=sizes.hidden_size)
    with tempfile.TemporaryDirectory() as folder, devices.thin_cloud(spec, Path(folder)) as cloud:
        device = Device(Path(folder) / "homes", "bench")
        device("enroll", "-", text=cloud.invite())
        devices.fill(device)
        os.environ.update(device.env)
        result = asking(device, sizes)
        settings = DeviceSettings.from_environment(device.profile)
        result |= remembering(settings, sizes) | asking_beside(settings, sizes)
    print(common.table(["figure", "value"], list(result.items())))
    common.finish(result, args.json)


def asking(device: Device, sizes: Sizes) -> dict[str, float]:
    """Times to the first token, ms."""
    settings = DeviceSettings.from_environment(device.profile)
    question = Question(_TEXT, temperature=0.0)
    command = [str(BIN / "perfit"), "--profile", device.profile, "ask", _TEXT, "--temperature", "0"]
    with Profile.open(settings, passphrase=lambda: PASSPHRASE) as profile:
        prepared = prepare(profile, question, [Mode.PERSONAL])
        profile.release_vault()

        def alone() -> None:
            stream = prepared.stream(Mode.PERSONAL)
            next(stream)
            stream.close()

        times = {"cloud": [common.timed(alone) for _ in range(sizes.asks)]}
        times["passphrase"] = [first_byte(command) for _ in range(sizes.asks)]
        launch.start(settings, PASSPHRASE)
        times["agent"], times["command"] = [], []
        for _ in range(sizes.asks):  # in turns: other work on the machine meets all of them
            times["cloud"].append(common.timed(alone))
            times["agent"].append(at_agent(settings, Ask(question)))
            times["command"].append(first_byte(command))
    medians = {name: 1e3 * median(values) for name, values in times.items()}
    added = {f"{name}_adds_ms": medians[name] - medians["cloud"] for name in ("agent", "command")}
    return {f"{name}_ms": value for name, value in medians.items()} | added


def at_agent(settings: DeviceSettings, asking: Ask) -> float:
    """Seconds to the first token, from before the connection."""
    first: list[float] = []

    def happened(event: Event) -> None:
        if isinstance(event, AnswerPart):
            first.append(time.perf_counter())

    begun = time.perf_counter()
    with connected(settings) as agent:
        agent.perform(asking, happened)
    return first[0] - begun


def first_byte(command: list[str]) -> float:
    """Seconds until a command prints something."""
    begun = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None  # noqa: S101 - it is a pipe
        os.read(process.stdout.fileno(), 1)
        return time.perf_counter() - begun


def remembering(settings: DeviceSettings, sizes: Sizes) -> dict[str, Any]:
    """The running agent's proportional set size, MB."""
    with connected(settings) as agent:
        pid = agent.hello.pid
        time.sleep(sizes.rest)
        idle = proportional(pid)
        endpoint = with_endpoint(settings, sizes.rest, pid)
        items = [HistoryItem.make(TASKS["news_headline"], item) for item in tiny.headlines(120)]
        agent.perform(ImportExamples(items))
        plan = {"epochs": sizes.epochs, "learning_rate": 1e-4}
        training = Thread(target=lambda: agent.perform(Update(settings=plan, checkpoint_seconds=5.0)))
        training.start()
        samples = []
        while training.is_alive():
            samples.append(proportional(pid))
            time.sleep(_POLL_SECONDS)
        training.join()
    memory = {"idle_mb": idle, "endpoint_mb": endpoint}
    return memory | {"updating_mb": median(samples), "updating_highest_mb": max(samples)}


def with_endpoint(settings: DeviceSettings, rest: float, pid: int) -> float:
    """MB, once an app was answered there."""
    found: list[float] = []

    def asked(event: Event) -> None:
        if isinstance(event, Serving):
            headers = {"Authorization": f"Bearer {event.token}", "Content-Type": "application/json"}
            body = {"model": "personal", "messages": [{"role": "user", "content": _TEXT}], "max_tokens": 4}
            url = f"{event.url}/chat/completions"
            request = urllib.request.Request(url, json.dumps(body).encode(), headers)  # noqa: S310
            urllib.request.urlopen(request).read()  # noqa: S310 - of this machine
            time.sleep(rest)
            found.append(proportional(pid))
            raise KeyboardInterrupt

    with connected(settings) as agent, contextlib.suppress(KeyboardInterrupt):
        agent.perform(Serve("127.0.0.1", 0), asked)
    return found[0]


def asking_beside(settings: DeviceSettings, sizes: Sizes) -> dict[str, float]:
    """The 95th percentile of whole asks, ms: idle, and beside an update. Ends the agent."""
    question = Ask(Question(_TEXT, temperature=0.0, max_tokens=16))

    def asked() -> None:
        with connected(settings) as agent:
            agent.perform(question)

    def percentile() -> float:
        times = [common.timed(asked) for _ in range(sizes.beside)]
        return 1e3 * quantiles(times, n=20)[-1]

    idle, steps = percentile(), list[Event]()
    trainer = connected(settings)
    endless = Update(settings={"epochs": 1000, "learning_rate": 1e-5}, fresh=True, again=True)

    def train() -> None:
        with contextlib.suppress(Unavailable):  # it is ended below
            trainer.perform(endless, steps.append)

    training = Thread(target=train)
    training.start()
    while training.is_alive() and not any(isinstance(event, Progress) for event in steps):
        time.sleep(_POLL_SECONDS)
    before = len(steps)
    beside = percentile()
    done = len(steps) - before
    if not training.is_alive():
        raise SystemExit("the update ended before the asks did")
    trainer.close()
    training.join()
    with connected(settings) as agent:
        agent.perform(Stop())
    return {
        "ask_p95_ms": idle,
        "ask_p95_updating_ms": beside,
        "p95_ratio": beside / idle,
        "steps_beside": done,
    }


def proportional(pid: int) -> float:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text("ascii").splitlines()
    return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("Pss:"))


def connected(settings: DeviceSettings) -> AgentClient:
    agent = client.connect(settings)
    if agent is None:
        raise SystemExit("the agent is gone")
    return agent


if __name__ == "__main__":
    main()
