"""Many devices, every RPC, and faults: no wrong answer, no lost update, no memory that grows.

    PYTHONPATH=scripts .venv/bin/python -m soak.load --calls 50000 --seed 1 --json load.json
    PYTHONPATH=scripts .venv/bin/python -m soak.load --calls 12000 --no-restarts --json memory.json

A real cloud serves a tiny model to devices that have keys, vaults and histories of their own, over mutual
TLS and through a proxy. While they ask, the proxy cuts all connections or lets nothing through, calls are
cancelled and given deadlines that are too short, and the cloud is stopped (SIGTERM, then SIGKILL, in turn)
and started again. Every device now and then trains a shift. soak.loading.devices says what is checked, and
with what tolerance.

With --no-restarts the cloud lives through all of it and a sixth of the calls is cancelled: its resident
memory after the first fifth of the calls may grow by 5 %. With restarts every life of 2,000 calls or more
is looked at in the same way. What is asked, by whom, and when faults come is a function of the seed; which
calls they meet is not. Ends with 1 when anything was wrong.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tiny
from local import LocalCloud
from perfit_cloud.service.identity.authority import Authority
from perfit_shared.invites import Invite
from soak.loading import devices as loading
from soak.loading.devices import Device, Tally, Wrong
from soak.loading.proxy import Proxy
from soak.settings import UNDER_LOAD
from soak.settings import flags as flags_of

__all__ = ["Life", "main", "run"]

_HANG_SECONDS = 400.0  # without a call answered, on any one device
_STOP_SECONDS = 60.0  # after SIGTERM; the cloud gives calls 10 s of them
_LOOK_SECONDS = 0.25
_SHORTEST_LIFE = 2_000  # calls, below which memory is still warming up
_GROWTH = 0.05
_CANCELLED = 20  # beside 96 other calls, where the cloud is not restarted: a sixth
_CALLS_A_RESTART = 6_000
_CALLS_A_CUT = 400
_CALLS_AN_UPDATE = 160  # of one device


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--calls", type=int, default=50_000, help="of all devices together")
    parser.add_argument("--devices", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--no-restarts", action="store_true", help="one life of the cloud, more cancellations"
    )
    parser.add_argument("--json", type=Path, help="where the result goes")
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        result = run(
            Path(folder),
            calls=args.calls,
            devices=args.devices,
            seed=args.seed,
            restarts=not args.no_restarts,
        )
    if args.json is not None:
        args.json.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    return 1 if result["wrong"] else 0


@dataclass
class Life:
    """Resident memory of one cloud process, by how many calls had been answered."""

    ended: str = "stop"
    samples: list[tuple[int, int]] = field(default_factory=list)  # (calls, KiB)

    def growth(self) -> float | None:
        """Median of the last fifth over that of the second, less 1; None: too short to say."""
        first, last = self.samples[0][0], self.samples[-1][0]
        if last - first < _SHORTEST_LIFE:
            return None
        fifth = (last - first) / 5
        begun = [kib for calls, kib in self.samples if first + fifth <= calls < first + 2 * fifth]
        ended = [kib for calls, kib in self.samples if calls >= last - fifth]
        return statistics.median(ended) / statistics.median(begun) - 1

    def to_json(self) -> dict[str, Any]:
        calls = self.samples[-1][0] - self.samples[0][0]
        return {
            "ended": self.ended,
            "calls": calls,
            "growth": self.growth(),
            "first_mib": self.samples[0][1] / 1024,
            "last_mib": self.samples[-1][1] / 1024,
        }


def run(folder: Path, *, calls: int, devices: int, seed: int, restarts: bool = True) -> dict[str, Any]:
    """Print what happens, and tell it as JSON; "wrong" holds what should not have been."""
    begun = time.monotonic()
    with ExitStack() as stack:
        port = _free_port()
        proxy = Proxy(port)
        stack.callback(proxy.close)
        flags = flags_of(UNDER_LOAD)
        flags += ["--address", f"127.0.0.1:{port}", "--public-address", f"127.0.0.1:{proxy.port}"]
        flags += ["--enrol-address", f"127.0.0.1:{_free_port()}"]
        model = tiny.build(folder / "tiny")
        cloud = stack.enter_context(
            LocalCloud(model.model, model.artefacts, folder / "state", log=folder / "cloud.log", flags=flags)
        )
        kinds = loading.KINDS if restarts else loading.KINDS | {"cancelled": _CANCELLED}
        people = [
            Device(n, invite, folder, seed=seed, kinds=kinds)
            for n, invite in enumerate(_invites(cloud, devices))
        ]
        for device in people:
            stack.callback(device.close)
        for device in people:
            device.learn_references()
        print(f"{devices} devices have their references after {time.monotonic() - begun:.0f} s", flush=True)
        load = _Load(cloud, proxy, people, calls=calls, seed=seed, restarts=restarts)
        load.run()
        wrong = [*load.wrong, *_grown(load.lives)]
        said = (folder / "cloud.log").read_text("utf-8", "replace").splitlines()
        wrong += [
            f"the cloud's log: {line[:300]}" for line in said if "ERROR" in line or "Traceback" in line
        ][:5]
    return _result(load, wrong, calls=calls, devices=devices, seed=seed, seconds=time.monotonic() - begun)


def _invites(cloud: LocalCloud, count: int) -> list[Invite]:
    """As `perfit-cloud invite` makes them, without a process for each."""
    authority = Authority(cloud.state, certificate_seconds=86_400, lapse_seconds=86_400)
    try:
        made = [authority.invite(600) for _ in range(count)]
        return [
            Invite(cloud.said["enrol_address"], authority.server_ca_der, end, secret) for secret, end in made
        ]
    finally:
        authority.close()


def _grown(lives: Sequence[Life]) -> list[str]:
    growths = [(number, life.growth()) for number, life in enumerate(lives)]
    return [
        f"memory of life {number} grew by {growth:.1%}"
        for number, growth in growths
        if growth is not None and growth > _GROWTH
    ]


def _result(load: _Load, wrong: list[str], **settings: Any) -> dict[str, Any]:
    total = Tally()
    for device in load.devices:
        total.add(device.tally)
    lives = [life.to_json() for life in load.lives]
    answered = sum(total.answered.values())
    print(
        f"{answered} calls answered, {total.updates} updates ({total.resumed} resumptions), "
        f"{len(lives)} lives of the cloud, {load.cuts} cuts, {load.stalls} stalls"
    )
    print("  " + ", ".join(f"{kind} {count}" for kind, count in total.answered.most_common()))
    print("  faults met: " + (", ".join(f"{name} {n}" for name, n in total.faults.most_common()) or "none"))
    print(
        "  furthest from the references, of what is allowed: "
        + ", ".join(f"{name} {share:.3f}" for name, share in sorted(total.furthest.items()))
    )
    for life in lives:
        grown = "too short to tell" if life["growth"] is None else f"{life['growth']:+.2%}"
        print(
            f"  a life of {life['calls']} calls, {life['ended']}: {life['last_mib']:.0f} MiB, growth {grown}"
        )
    for line in wrong:
        print(f"  WRONG {line}", file=sys.stderr)
    return {
        **settings,
        **total.to_json(),
        "calls_answered": answered,
        "lives": lives,
        "cuts": load.cuts,
        "stalls": load.stalls,
        "wrong": wrong,
        "tolerances": {"loss": loading.LOSS, "gradient": loading.GRADIENT, "update": loading.UPDATE},
    }


class _Load:
    """The threads of the devices, and the one that makes faults and watches."""

    def __init__(
        self, cloud: LocalCloud, proxy: Proxy, devices: list[Device], *, calls: int, seed: int, restarts: bool
    ) -> None:
        self.devices = devices
        self.lives = [Life()]
        self.wrong: list[str] = []
        self.cuts = self.stalls = 0
        self._cloud, self._proxy = cloud, proxy
        self._calls, self._restarts = calls, restarts
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self._left = calls
        self._seen: dict[int, tuple[int, int]] = {}  # by device: its progress, looks since that changed
        self._begun = 0  # calls that were begun; what is answered lags by no more than a call a device

    def run(self) -> None:
        threads = [
            threading.Thread(target=self._drive, args=(device,), name=f"device {device.number}", daemon=True)
            for device in self.devices
        ]
        for thread in threads:
            thread.start()
        self._disturb(threads)
        if not self.wrong:
            for thread in threads:
                thread.join()

    # -- a device's thread -------------------------------------------------------------------------------

    def _drive(self, device: Device) -> None:
        until_update = random.Random(device.number).randrange(_CALLS_AN_UPDATE)
        try:
            while not self.wrong and self._take():
                if until_update == 0:
                    device.update()
                    until_update = _CALLS_AN_UPDATE
                until_update -= 1
                device.call()
        except Wrong as error:
            self.wrong.append(str(error))
        except Exception as error:
            self.wrong.append(f"device {device.number}: {type(error).__name__}: {error}"[:500])
            raise

    def _take(self) -> bool:
        with self._lock:
            self._left -= 1
            self._begun += self._left >= 0
            return self._left >= 0

    # -- the thread of faults ------------------------------------------------------------------------------

    def _disturb(self, threads: Sequence[threading.Thread]) -> None:
        """Until all are done: look at memory and at the clock, and make a fault every so many calls."""
        next_cut, lives = self._begun + _CALLS_A_CUT, max(1, min(8, self._calls // _CALLS_A_RESTART) or 2)
        ends = [self._calls * n // (lives + 1) for n in range(1, lives + 1)] if self._restarts else []
        while any(thread.is_alive() for thread in threads) and not self.wrong:
            time.sleep(_LOOK_SECONDS)
            self._watch(threads)
            if ends and self._begun >= ends[0]:
                ends.pop(0)
                self._restart("SIGKILL" if len(self.lives) % 2 == 0 else "SIGTERM")
            elif self._begun >= next_cut:
                next_cut = self._begun + _CALLS_A_CUT
                self._cut()

    def _watch(self, threads: Sequence[threading.Thread]) -> None:
        """Called four times a second; time in which it was not, the machine stood still or was too busy."""
        self._look()
        for device, thread in zip(self.devices, threads, strict=True):
            progress, looks = self._seen.get(device.number, (-1, 0))
            looks = looks + 1 if progress == device.progress else 0
            self._seen[device.number] = (device.progress, looks)
            if thread.is_alive() and looks > _HANG_SECONDS / _LOOK_SECONDS:
                self.wrong.append(f"device {device.number} hangs: {_whereabouts(thread)}")
                faulthandler.dump_traceback()
        if self._cloud.process.poll() is not None:
            self.wrong.append(f"the cloud ended with {self._cloud.process.returncode}")

    def _look(self) -> None:
        self.lives[-1].samples.append((self._begun, _resident_kib(self._cloud.process.pid)))

    def _restart(self, how: str) -> None:
        self.lives[-1].ended = how
        print(f"{self._begun} of {self._calls} calls begun; {how} for the cloud", flush=True)
        if how == "SIGTERM":
            self._cloud.process.terminate()
            try:
                code = self._cloud.process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                code = None
            if code != 0:
                self.wrong.append(f"{_STOP_SECONDS:g} s after SIGTERM the cloud's exit code is {code}")
                return
        else:
            self._cloud.kill()
        self._cloud.start()
        self.lives.append(Life())
        self._look()

    def _cut(self) -> None:
        if self._random.random() < 0.6:
            self._proxy.cut()
            self.cuts += 1
        else:
            self._proxy.stall(self._random.uniform(0.1, 1.5))
            self.stalls += 1


def _whereabouts(thread: threading.Thread) -> str:
    """Innermost frame last, without the interpreter's own."""
    frame = sys._current_frames().get(thread.ident or 0)
    lines = [f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in traceback.extract_stack(frame)]
    return " > ".join(lines[-12:]) if frame is not None else "it ended"


def _resident_kib(process: int) -> int:
    for line in Path(f"/proc/{process}/status").read_text("utf-8").splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1])
    return 0


def _free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


if __name__ == "__main__":
    sys.exit(main())
