"""A fleet under load and faults: no wrong answer, no lost update, nobody let in who was withdrawn.

    make fleet CALLS=20000 UPDATES=200 SEED=1

Three replicas, one enrolling server, PostgreSQL and HAProxy (TLS passes through), a tiny random model, and
devices with keys, vaults and histories of their own. The first tenth of the calls meets no faults. In the
rest a replica is killed every 20 s on average (SIGKILL or SIGTERM) and started again. The last one that is up
is spared: that kill comes once there is another. PostgreSQL is restarted twice, once as by a power cut;
HAProxy is reloaded. soak.loading.devices says what is checked of answers and updates, soak.fleets.withdrawn
what of devices that are revoked meanwhile.

HAProxy has a short configuration of this soak's own: no PROXY header, checks of ports instead of /ready, and
no limits by address, since all devices call from one. tests/cloud/test_draining_replicas.py and
test_proxied.py run deploy/haproxy/haproxy.cfg.

The last line has the figures. Ends with 1 when one falls short. p95, the transactions of the database, and
whether half of the expected kills came, are judged from 10,000 calls on. What is asked is a function of the
seed; which calls the faults meet is not.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import tiny
from perfit_shared.invites import Invite
from soak.fleets.processes import Fleet, Replica
from soak.fleets.withdrawn import Withdrawn
from soak.loading.devices import Device, Tally, Wrong

__all__ = ["main", "run"]

_REPLICAS = 3
_KILL_SECONDS = 20.0  # between two kills, on average
_AWAY_SECONDS = 3.0  # that PostgreSQL stays away, and the time that it takes to start
_RELOADS = 4
_CALM = 0.1  # share of the calls before the first fault
_IDLE_SECONDS = 20.0  # in which the database is looked at while nobody calls
_LEAST_KILLS = 0.5  # share of those that come on average
_MOST_SLOWER = 2.0  # p95 of answers, against that without faults
_MOST_TRANSACTIONS = 0.01  # of the database, for a call
# With fewer, p95 hangs on a single fault, and transactions on a few that come anyway: said and not judged.
_CALLS_TO_JUDGE = 10_000
_HANG_SECONDS = 400.0
_LOOK_SECONDS = 0.25


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--calls", type=int, default=20_000, help="of all devices together")
    parser.add_argument("--updates", type=int, default=200, help="of all devices together")
    parser.add_argument("--devices", type=int, default=64)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="where the result goes")
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        result = run(
            Path(folder), calls=args.calls, updates=args.updates, devices=args.devices, seed=args.seed
        )
    if args.json is not None:
        args.json.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    return 1 if result["wrong"] else 0


def run(folder: Path, *, calls: int, updates: int, devices: int, seed: int) -> dict[str, Any]:
    """Print what happens, and tell it as JSON; "wrong" holds what should not have been."""
    begun = time.monotonic()
    model = tiny.build(folder / "tiny")
    with closing(Fleet(folder, model.model, model.artefacts, replicas=_REPLICAS)) as fleet:
        print(f"the fleet runs after {time.monotonic() - begun:.0f} s", flush=True)
        people = [Device(number, _invite(fleet), folder, seed=seed) for number in range(devices)]
        try:
            with ThreadPoolExecutor(8) as pool:
                list(pool.map(Device.learn_references, people))
            print(
                f"{devices} devices have their references after {time.monotonic() - begun:.0f} s", flush=True
            )
            load = _Load(fleet, people, calls=calls, updates=updates, seed=seed)
            load.run()
            wrong = [*load.wrong, *fleet.complaints()]
        finally:
            for device in people:
                device.close()
    result = {
        "calls": calls,
        "devices": devices,
        "seed": seed,
        "seconds": time.monotonic() - begun,
        **load.figures(),
        "wrong": [*wrong, *load.short()],
    }
    for line in result["wrong"]:
        print(f"  WRONG {line}", file=sys.stderr)
    print(_last_line(result), flush=True)
    return result


def _invite(fleet: Fleet) -> Invite:
    secret, expires = fleet.authority.invite(3600)
    return Invite(fleet.enrol_address, fleet.authority.server_ca_der, expires, secret)


def _last_line(result: dict[str, Any]) -> str:
    p95 = result["p95_ms"]
    return (
        f"{'WRONG' if result['wrong'] else 'ok'}: {result['answered']} calls and {result['updates']} updates "
        f"({result['resumed']} resumed) of {result['devices']} devices, {result['kills']} kills "
        f"({result['kills_expected']:.1f} expected), "
        f"{result['database_restarts']} database restarts, {result['reloads']} reloads; "
        f"{len(result['wrong'])} wrong; {result['revoked']} revoked, the last answer to one began "
        f"{result['latest_call_s']:.2f} s after (database away: {result['latest_call_away_s']:.2f} s), "
        f"its stream ended after {result['latest_stream_s']:.2f} s; p95 of answers {p95['faults']:.0f} ms, "
        f"without faults {p95['calm']:.0f} ms ({p95['faults'] / p95['calm']:.2f} times); "
        f"{result['database_per_call']:.3f} transactions of the database a call"
    )


class _Load:
    """The threads of the devices, and the one that makes faults and watches."""

    def __init__(self, fleet: Fleet, devices: list[Device], *, calls: int, updates: int, seed: int) -> None:
        self._fleet, self.devices = fleet, devices
        self._calls, self._every = calls, max(1, calls // max(1, updates))
        self._random = random.Random(f"faults {seed}")
        self.wrong: list[str] = []
        self.kills: list[str] = []
        self._lock = threading.Lock()
        self._begun = 0
        self._answers: dict[str, list[float]] = {"calm": [], "faults": []}  # seconds
        self._phase = "calm"
        self._starts: list[threading.Thread] = []
        self._seen: dict[int, tuple[int, float]] = {}
        self._transactions: dict[str, float] = {}
        self._faults_seconds = 0.0  # that calls were made among faults

    def run(self) -> None:
        count, seconds = self._transactions_in(lambda: time.sleep(_IDLE_SECONDS))
        idle = count / seconds
        calm = int(self._calls * _CALM)
        count, seconds = self._transactions_in(lambda: self._drive_all(calm, lambda: None))
        # What replicas read anyway, called or not, is no cost of calls.
        self._transactions = {
            "idle_per_second": idle,
            "per_call": max(0.0, count - idle * seconds) / max(1, calm),
        }
        print(f"{calm} calls without faults took {seconds:.0f} s", flush=True)
        if self.wrong:
            return
        self._phase = "faults"
        self._withdrawn = Withdrawn(self._fleet)
        self._plan()
        begun = time.monotonic()
        self._drive_all(self._calls, self._disturb)
        self._faults_seconds = time.monotonic() - begun
        self._withdrawn.stop()
        for thread in self._starts:
            thread.join()
        self.wrong += self._withdrawn.wrong

    def _transactions_in(self, act: Callable[[], object]) -> tuple[float, float]:
        """How many transactions of the database end while `act` runs, and in how many seconds."""
        import psycopg

        def count() -> float:
            with psycopg.connect(self._fleet.database, autocommit=True) as db:
                db.execute("SELECT pg_stat_clear_snapshot()")
                row = db.execute(
                    "SELECT xact_commit FROM pg_stat_database WHERE datname = current_database()"
                ).fetchone()
            return float(row[0]) if row else 0.0

        before, begun = count(), time.monotonic()
        act()
        time.sleep(1.5)  # backends report once a second
        return count() - before - 4, time.monotonic() - begun  # 4 are our own

    # -- devices -----------------------------------------------------------------------------------------

    def _drive_all(self, until: int, disturb: Callable[[], None]) -> None:
        threads = [
            threading.Thread(
                target=self._drive, args=(device, until), name=f"device {device.number}", daemon=True
            )
            for device in self.devices
        ]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads) and not self.wrong:
            time.sleep(_LOOK_SECONDS)
            self._watch(threads)
            disturb()

    def _drive(self, device: Device, until: int) -> None:
        try:
            while not self.wrong and (number := self._take(until)) is not None:
                if number % self._every == self._every - 1:
                    device.update()
                kind, seconds = device.call()
                if kind.startswith("generate"):
                    self._answers[self._phase].append(seconds)
        except Wrong as error:
            self.wrong.append(str(error)[:500])
        except Exception as error:
            self.wrong.append(f"device {device.number}: {type(error).__name__}: {error}"[:500])
            raise

    def _take(self, until: int) -> int | None:
        with self._lock:
            if self._begun >= until:
                return None
            self._begun += 1
            return self._begun - 1

    def _watch(self, threads: Sequence[threading.Thread]) -> None:
        now = time.monotonic()
        for device, thread in zip(self.devices, threads, strict=True):
            progress, since = self._seen.get(device.number, (-1, now))
            if progress != device.progress:
                self._seen[device.number] = (device.progress, now)
            elif thread.is_alive() and now - since > _HANG_SECONDS:
                self.wrong.append(f"device {device.number} hangs")
        if not self._fleet.balancer.is_alive:
            self.wrong.append("HAProxy ended")

    # -- faults ------------------------------------------------------------------------------------------

    def _plan(self) -> None:
        """Which faults come after how many calls; kills come by the clock."""
        first, rest = self._begun, self._calls - self._begun
        at: list[tuple[int, Callable[[], None]]] = [
            (first + rest // 3, lambda: self._restart_database("fast")),
            (first + 2 * rest // 3, lambda: self._restart_database("immediate")),
        ]
        at += [
            (first + rest * (2 * n + 1) // (2 * _RELOADS), self._fleet.balancer.reload)
            for n in range(_RELOADS)
        ]
        self._faults = sorted(at, key=lambda fault: fault[0])
        self._next_kill = time.monotonic() + self._random.expovariate(1 / _KILL_SECONDS)

    def _disturb(self) -> None:
        while self._faults and self._begun >= self._faults[0][0]:
            self._faults.pop(0)[1]()
        up = [replica for replica in self._fleet.replicas if replica.is_up]
        if time.monotonic() >= self._next_kill and len(up) > 1:
            # From when it was due: one that had to wait does not make the next ones fewer.
            self._next_kill += self._random.expovariate(1 / _KILL_SECONDS)
            self._kill(self._random.choice(up), "SIGKILL" if len(self.kills) % 2 == 0 else "SIGTERM")

    def _kill(self, replica: Replica, how: str) -> None:
        print(f"{self._begun} of {self._calls} calls begun; {how} for replica {replica.number}", flush=True)
        self.kills.append(how)
        replica.is_up = False

        def again() -> None:
            if said := replica.end(how):
                self.wrong.append(said)
            replica.start()

        self._in_background(f"replica {replica.number}", again)

    def _restart_database(self, how: str) -> None:
        print(f"{self._begun} of {self._calls} calls begun; PostgreSQL stops ({how})", flush=True)
        self._in_background("PostgreSQL", lambda: self._fleet.restart_database(how, _AWAY_SECONDS))

    def _in_background(self, name: str, restart: Callable[[], None]) -> None:
        def told() -> None:
            try:
                restart()
            except Exception as error:
                self.wrong.append(f"{name} did not start again: {error}"[:500])

        self._starts.append(threading.Thread(target=told, name=name))
        self._starts[-1].start()

    # -- what came of it ---------------------------------------------------------------------------------

    def figures(self) -> dict[str, Any]:
        total = Tally()
        for device in self.devices:
            total.add(device.tally)
        withdrawn = getattr(self, "_withdrawn", None)
        starts = [s for replica in self._fleet.replicas for s in replica.starting_seconds]
        return {
            **total.to_json(),
            "answered_by_kind": dict(total.answered),
            "answered": sum(total.answered.values()),
            "kills": len(self.kills),
            "kills_expected": self._faults_seconds / _KILL_SECONDS,
            "starting_s": statistics.median(starts),
            "database_restarts": len(self._fleet.outages),
            "reloads": self._fleet.balancer.reloads,
            "revoked": withdrawn.count if withdrawn else 0,
            "revoked_answered_before": withdrawn.answered if withdrawn else 0,
            "revoked_refused_after": withdrawn.refused if withdrawn else 0,
            "latest_call_s": withdrawn.latest if withdrawn else 0.0,
            "latest_call_away_s": withdrawn.latest_away if withdrawn else 0.0,
            "latest_stream_s": withdrawn.latest_stream if withdrawn else 0.0,
            "p95_ms": {phase: 1000 * _p95(seconds) for phase, seconds in self._answers.items()},
            "database_per_call": self._transactions.get("per_call", float("nan")),
            "database_idle_per_second": self._transactions.get("idle_per_second", float("nan")),
        }

    def short(self) -> list[str]:
        """Which figures fall short, beside what was wrong on the way."""
        found = self.figures()
        short = []
        is_judged = self._calls >= _CALLS_TO_JUDGE
        if found["answered"] < self._calls:
            short.append(f"{found['answered']} of {self._calls} calls were answered")
        if found["updates"] < self._calls // self._every:
            short.append(f"{found['updates']} of {self._calls // self._every} updates ended")
        if is_judged and found["p95_ms"]["faults"] > _MOST_SLOWER * found["p95_ms"]["calm"]:
            short.append("p95 of answers is more than twice that without faults")
        if is_judged and found["database_per_call"] > _MOST_TRANSACTIONS:
            short.append(f"a call costs {found['database_per_call']:.3f} transactions of the database")
        if not found["revoked"] or not found["revoked_answered_before"]:
            short.append("nobody was revoked while calling, so nothing is shown of it")
        if found["database_restarts"] != 2 or found["reloads"] != _RELOADS or not found["kills"]:
            short.append("not all faults came")
        if is_judged and found["kills"] < _LEAST_KILLS * found["kills_expected"]:
            short.append(f"{found['kills']} kills, where {found['kills_expected']:.1f} come on average")
        return short


def _p95(seconds: list[float]) -> float:
    return statistics.quantiles(seconds, n=20)[-1] if len(seconds) > 1 else float("nan")


if __name__ == "__main__":
    sys.exit(main())
