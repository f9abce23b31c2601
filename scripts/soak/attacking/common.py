"""One hostile device against a real cloud, beside an honest device whose answers are timed.

    ATTACKS = [Attack("A1 empty candidates", empty_candidates, threads=2)]

    def empty_candidates(attacker: Attacker) -> None:      # one round; called again until time is over
        attacker.call("Score", BOMB)

    if __name__ == "__main__":
        sys.exit(main(__doc__, ATTACKS))

A cloud (`perfit-cloud serve` with its defaults, a random Llama of 6 blocks of 256) runs in a process of
its own. The honest device of this process asks for a short answer again and again, first alone, then
while the attack runs.
Attackers run in processes of their own at the lowest priority, as if on another machine, each with an
identity of its own unless the attack says otherwise. Then the hostile device makes an ordinary call.
With --code CHECKOUT the cloud is the one of another checkout: the figure before.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import grpc
import psutil

import tiny
from bench.common import finish, table
from local import LocalCloud
from perfit_device.cloud.channels import enrolment_channel, mutual_channel
from perfit_device.cloud.client import Cloud
from perfit_device.cloud.codec import ShiftUse
from perfit_device.cloud.enrolment import enroll
from perfit_device.cloud.identity import Enrolment, Identity
from perfit_shared.errors import PerfitError
from perfit_shared.invites import Invite
from perfit_shared.types import Sampling

__all__ = ["Attack", "Attacker", "Outcome", "main", "measure", "serving"]

_PATH = "/perfit.v1.Personalization/"
_PATIENCE = 90.0  # seconds that the honest device waits for one answer
_PAUSE = 0.05  # between two of its questions
_SAMPLE_SECONDS = 0.05  # between two looks at the server's memory
_CALL_SECONDS = 60.0  # deadline of a hostile call
_LEGAL_SECONDS = 120.0  # until the hostile device's own legal call succeeds
_MIB = 2**20


@dataclass(frozen=True)
class Attack:
    """What hostile devices do. `act` and `prepare` are functions of a module, since processes are spawned."""

    name: str
    act: Callable[[Attacker], object]  # one round, in each thread of each process; its errors are counted
    processes: int = 1  # hostile devices
    threads: int = 2  # of each
    flags: tuple[str, ...] = ()  # of `perfit-cloud serve`
    prepare: Callable[[LocalCloud, Enrolment], object] | None = None  # before it, e.g. to revoke the device
    honest: Callable[[Cloud], object] | None = None  # what the honest device asks; None: a short answer
    is_legal_after: bool = True  # whether an ordinary call of the hostile device succeeds in the end


class Attacker:
    """A hostile device, inside a process of its own. Several threads share it."""

    def __init__(self, enrolment: Enrolment, pid: int) -> None:
        self.enrolment = enrolment
        self.pid = pid  # of the server
        self.outcomes: Counter[str] = Counter()
        self.is_over = threading.Event()
        self.channel = mutual_channel(enrolment, enrolment.address)
        self.enrol_channel = enrolment_channel(enrolment.enrolment_address, enrolment.roots)
        self._lock = threading.Lock()

    def call(
        self,
        path: str,
        message: bytes,
        *,
        compress: bool = False,
        seconds: float = _CALL_SECONDS,
        channel: grpc.Channel | None = None,
    ) -> str:
        """One call of serialized bytes; the name of its status, which is counted.

        `path`: a method of Personalization, or whole ("/perfit.v1.Identity/Renew").
        """
        return self.stream(path, [message], compress=compress, seconds=seconds, channel=channel)

    def stream(
        self,
        path: str,
        messages: Iterable[bytes],
        *,
        compress: bool = False,
        seconds: float = _CALL_SECONDS,
        channel: grpc.Channel | None = None,
    ) -> str:
        """As `call`, of a method that takes several messages."""
        method = (channel or self.channel).stream_stream(path if path.startswith("/") else _PATH + path)
        coding = grpc.Compression.Gzip if compress else grpc.Compression.NoCompression
        try:
            for _ in method(iter(messages), timeout=seconds, compression=coding):
                pass
        except grpc.RpcError as error:
            return self.count(error.code().name)  # type: ignore[attr-defined]
        return self.count("OK")

    def count(self, outcome: str) -> str:
        with self._lock:
            self.outcomes[outcome] += 1
        return outcome


@dataclass
class Outcome:
    """What an attack did to the honest device and to the server."""

    attack: str
    seconds: float = 0.0
    idle_p95_ms: float = 0.0
    beside_p50_ms: float = 0.0
    beside_p95_ms: float = 0.0
    beside_max_ms: float = 0.0
    honest_calls: int = 0
    honest_refused: int = 0
    idle_mib: float = 0.0  # resident memory of the server before, and its highest during the attack
    peak_mib: float = 0.0
    attacker: dict[str, int] = field(default_factory=dict)  # outcomes of its calls
    legal_after: str = ""  # how the hostile device's own ordinary call ended
    server: str = "alive"

    @property
    def allowed_ms(self) -> float:
        """What the honest p95 may be: 3 times the idle one, or 300 ms over it."""
        return max(3 * self.idle_p95_ms, self.idle_p95_ms + 300)

    @property
    def is_within(self) -> bool:
        return self.server == "alive" and not self.honest_refused and self.beside_p95_ms <= self.allowed_ms


@contextmanager
def serving(
    folder: Path, *, code: Path | None = None, flags: Sequence[str] = (), prefix: Sequence[str] = ()
) -> Iterator[LocalCloud]:
    """A cloud; of the checkout `code`, where given."""
    parts = [] if code is None else [str(code.resolve() / part) for part in ("shared", "device", "cloud")]
    environment = {"PYTHONPATH": os.pathsep.join(parts)} if parts else {}
    served = tiny.build(folder / "served", shape=tiny.SMALL)
    cloud = LocalCloud(
        served.model,
        served.artefacts,
        folder / "state",
        log=folder / "cloud.log",
        flags=flags,
        env=environment,
        prefix=prefix,
    )
    with cloud:
        yield cloud


def main(description: str | None, attacks: Sequence[Attack], arguments: Sequence[str] | None = None) -> int:
    """Run attacks as the command line says; 1 when one of them did more than it may."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="attacks whose names hold this")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each attack")
    parser.add_argument("--code", type=Path, help="a checkout whose cloud is attacked instead of this one's")
    parser.add_argument(
        "--json", type=Path, help='where the result goes, as "before" with --code, else "after"'
    )
    args = parser.parse_args(arguments)
    found = []
    for attack in attacks:
        if args.only in attack.name:
            with tempfile.TemporaryDirectory() as folder:
                found.append(measure(attack, Path(folder), seconds=args.seconds, code=args.code))
            print(json.dumps(asdict(found[-1])), flush=True)
            if args.json is not None:
                _add(args.json, "before" if args.code else "after", found[-1])
    print(_table(found))
    return 0 if all(one.is_within for one in found) else 1


def _add(file: Path, when: str, outcome: Outcome) -> None:
    """Put it into the file, in place of what it had of this attack."""
    known = json.loads(file.read_text("utf-8")) if file.exists() else {}
    others = [one for one in known.get(when, []) if one["attack"] != outcome.attack]
    finish({**known, when: [*others, asdict(outcome)]}, file)


def measure(attack: Attack, folder: Path, *, seconds: float, code: Path | None = None) -> Outcome:
    """One attack of so many seconds, beside an honest device; the cloud runs in `folder`."""
    outcome = Outcome(attack.name, seconds)
    with ExitStack() as stack:
        cloud = stack.enter_context(serving(folder, code=code, flags=attack.flags))
        hostile = [_enrolled(cloud) for _ in range(attack.processes)]
        honest = stack.enter_context(Cloud(_enrolled(cloud)))
        server = psutil.Process(cloud.process.pid)
        ask = attack.honest or _answer
        _asked(honest, ask, outcome, seconds=2.0)  # warms everything up
        idle, _ = _asked(honest, ask, outcome, seconds=min(10.0, seconds))
        outcome.idle_mib, outcome.idle_p95_ms = server.memory_info().rss / _MIB, _percentile(idle, 95)
        for enrolment in hostile:
            if attack.prepare is not None:
                attack.prepare(cloud, enrolment)
        outcome.honest_refused = 0
        with _peak(server, outcome), _attacking(attack, hostile, cloud.process.pid, outcome):
            beside, outcome.honest_calls = _asked(honest, ask, outcome, seconds=seconds)
        outcome.server = "alive" if cloud.process.poll() is None else f"ended with {cloud.process.returncode}"
        if beside:
            outcome.beside_p50_ms, outcome.beside_p95_ms = statistics.median(beside), _percentile(beside, 95)
            outcome.beside_max_ms = max(beside)
        if attack.is_legal_after:
            outcome.legal_after = _legal(hostile[0])
    return outcome


def _enrolled(cloud: LocalCloud) -> Enrolment:
    return enroll(Invite.decode(cloud.invite()), Identity.create())


def _asked(
    honest: Cloud, ask: Callable[[Cloud], object], outcome: Outcome, *, seconds: float
) -> tuple[list[float], int]:
    """(milliseconds of every answer, calls made) of a device that asks again and again."""
    found: list[float] = []
    calls, end = 0, time.monotonic() + seconds
    while time.monotonic() < end:
        begun, calls = time.monotonic(), calls + 1
        try:
            ask(honest)
        except PerfitError as error:
            outcome.honest_refused += 1
            print(f"  the honest device was refused: {type(error).__name__}: {error}", file=sys.stderr)
        found.append(1000 * (time.monotonic() - begun))
        time.sleep(_PAUSE)
    return found, calls


def _answer(honest: Cloud) -> None:
    watch = threading.Timer(_PATIENCE, honest.close)
    watch.daemon = True
    watch.start()
    try:
        for _ in honest.generate("The council will", ShiftUse(), Sampling(8)):
            pass
    finally:
        watch.cancel()


def _legal(enrolment: Enrolment) -> str:
    """How the hostile device's ordinary call ends, after as many tries as its patience allows."""
    end, said = time.monotonic() + _LEGAL_SECONDS, ""
    with Cloud(enrolment) as cloud:
        while time.monotonic() < end:
            try:
                _answer(cloud)
                return "OK"
            except PerfitError as error:
                said = type(error).__name__
                time.sleep(max(0.2, error.retry_ms / 1000))
    return said


@contextmanager
def _attacking(attack: Attack, hostile: Sequence[Enrolment], pid: int, outcome: Outcome) -> Iterator[None]:
    """The attack in processes of its own, for the length of the block."""
    context = multiprocessing.get_context("spawn")
    over, found = context.Event(), context.Queue()
    processes = [
        context.Process(target=_attack, args=(attack, enrolment.to_bytes(), pid, over, found), daemon=True)
        for enrolment in hostile
    ]
    for process in processes:
        process.start()
    for _ in processes:
        found.get(timeout=60)  # it is about to begin
    try:
        yield
    finally:
        over.set()
        total: Counter[str] = Counter()
        for _ in processes:
            total += found.get(timeout=60)
        for process in processes:
            process.join(5)
            process.kill()
        outcome.attacker = dict(total.most_common())


def _attack(attack: Attack, enrolment: bytes, pid: int, over: Any, found: Any) -> None:
    """A process that attacks until `over` is set."""
    os.nice(19)
    attacker = Attacker(Enrolment.from_bytes(enrolment), pid)

    def run() -> None:
        while not over.is_set():
            try:
                attack.act(attacker)
            except Exception as error:
                attacker.count(type(error).__name__)
                time.sleep(0.01)

    found.put(Counter())
    workers = [threading.Thread(target=run, daemon=True) for _ in range(attack.threads)]
    for worker in workers:
        worker.start()
    over.wait()
    attacker.is_over.set()
    attacker.channel.close()  # ends what is under way
    attacker.enrol_channel.close()
    for worker in workers:
        worker.join(5)
    found.put(attacker.outcomes)


@contextmanager
def _peak(server: psutil.Process, outcome: Outcome) -> Iterator[None]:
    """The server's highest resident memory during the block."""
    over = threading.Event()

    def look() -> None:
        while not over.wait(_SAMPLE_SECONDS):
            try:
                outcome.peak_mib = max(outcome.peak_mib, server.memory_info().rss / _MIB)
            except psutil.NoSuchProcess:
                return

    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()


def _percentile(values: Sequence[float], percent: int) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, percent * len(ordered) // 100)] if ordered else 0.0


def _table(outcomes: Sequence[Outcome]) -> str:
    rows = [
        (
            one.attack,
            f"{one.idle_p95_ms:.0f}",
            f"{one.beside_p95_ms:.0f}",
            f"{one.allowed_ms:.0f}",
            f"{one.beside_max_ms:.0f}",
            one.honest_refused,
            f"{one.idle_mib:.0f} to {one.peak_mib:.0f}",
            ", ".join(f"{name} {count}" for name, count in one.attacker.items()),
            one.legal_after,
            one.server,
        )
        for one in outcomes
    ]
    headers = (
        "attack",
        "idle p95, ms",
        "beside it",
        "allowed",
        "longest",
        "honest refused",
        "memory, MiB",
        "the attacker's calls",
        "its legal call",
        "server",
    )
    return table(headers, rows)
