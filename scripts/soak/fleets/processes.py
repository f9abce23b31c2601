"""The processes of a fleet on this machine: an enrolling server, replicas, PostgreSQL and HAProxy."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from local import CommandFailed, LocalCloud
from local_postgres import Cluster
from perfit_cloud.service.identity.authority import Authority
from perfit_shared.errors import Busy, exit_code
from soak.settings import UNDER_LOAD, flags

__all__ = ["Balancer", "Fleet", "Replica", "free_port"]

_DAY = 86_400
_STOP_SECONDS = 60.0  # after SIGTERM; a replica gives calls 10 s of them
_START_SECONDS = 300.0  # in which a replica must come up
_AWAY = exit_code(Busy(""))
_HAPROXY = """\
global
    maxconn 4000
defaults
    mode tcp
    timeout connect 2s
    timeout client 2h
    timeout server 2h
    option redispatch
    retries 3
frontend devices
    bind 127.0.0.1:{port}
    default_backend replicas
backend replicas
    balance leastconn
    default-server check inter 500ms fall 1 rise 1 on-marked-down shutdown-sessions
{servers}
"""


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


class Balancer:
    """HAProxy, which passes TLS through to the replicas."""

    def __init__(self, folder: Path, ports: Sequence[int]) -> None:
        """Raises RuntimeError when HAProxy is not installed."""
        program = shutil.which("haproxy", path="/usr/sbin:/usr/bin:/usr/local/sbin:/usr/local/bin")
        if program is None:
            raise RuntimeError("HAProxy is not installed")
        self.port, self.reloads = free_port(), 0
        config = folder / "haproxy.cfg"
        servers = "\n".join(f"    server replica{n} 127.0.0.1:{port}" for n, port in enumerate(ports))
        config.write_text(_HAPROXY.format(port=self.port, servers=servers))
        log = (folder / "haproxy.log").open("wb")
        self._process = subprocess.Popen([program, "-W", "-f", str(config)], stdout=log, stderr=log)

    def reload(self) -> None:
        """A new worker takes new connections; the old one keeps those that it has."""
        self._process.send_signal(signal.SIGUSR2)
        self.reloads += 1

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def close(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()


class Replica:
    """One that answers and updates."""

    def __init__(self, number: int, cloud: LocalCloud, port: int) -> None:
        self.number, self.cloud, self.port = number, cloud, port
        self.is_up = False
        self.starting_seconds: list[float] = []

    def start(self) -> None:
        """As a service manager does: again while the database is away, which ends a start with 3."""
        begun = time.monotonic()
        while True:
            try:
                self.cloud.start()
                break
            except CommandFailed as error:
                if error.code != _AWAY or time.monotonic() > begun + _START_SECONDS:
                    raise
                time.sleep(1)
        self.starting_seconds.append(time.monotonic() - begun)
        self.is_up = True

    def end(self, how: str) -> str:
        """What was wrong with how it ended."""
        self.is_up = False
        if how == "SIGKILL":
            self.cloud.kill()
            return ""
        self.cloud.process.terminate()
        try:
            code = self.cloud.process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.cloud.kill()
            return f"replica {self.number} still ran {_STOP_SECONDS:g} s after SIGTERM"
        return f"replica {self.number} ended with {code} after SIGTERM" if code else ""


class Fleet:
    """Everything runs when it is made. Logs lie in `folder`."""

    def __init__(self, folder: Path, model: Path, artefacts: Sequence[Path], *, replicas: int) -> None:
        self.folder = folder
        self.cluster = Cluster()
        self._closes = [self.cluster.close]
        self.outages: list[tuple[float, float]] = []  # of the database: monotonic seconds, from and to
        self._restarts = threading.Lock()
        try:
            self._make(model, artefacts, replicas)
        except BaseException:
            self.close()
            raise

    def _make(self, model: Path, artefacts: Sequence[Path], replicas: int) -> None:
        self.database = self.cluster.database()
        ports = [free_port() for _ in range(replicas)]
        self.balancer = Balancer(self.folder, ports)
        self._closes.append(self.balancer.close)
        self.enrol_address = f"127.0.0.1:{free_port()}"
        public = f"127.0.0.1:{self.balancer.port}"
        # This process makes invites and revokes, as `perfit-cloud` does beside the enrolling server.
        self.authority = Authority(
            self.folder / "enrolment",
            certificate_seconds=_DAY,
            lapse_seconds=_DAY,
            database=self.database,
            refuse_after=30,
        )
        self._closes.append(self.authority.close)
        shared = flags(UNDER_LOAD)
        shared += ["--set", f"database={self.database}"]
        enrolling = [*shared, "--roles", "enrolment", "--enrol-address", self.enrol_address]
        self.enrolling = LocalCloud(
            None,
            (),
            self.folder / "enrolment",
            log=self.folder / "enrolment.log",
            flags=[*enrolling, "--public-address", public],
        )
        self.enrolling.start()
        self._closes.append(self.enrolling.stop)
        self.replicas = []
        for number, port in enumerate(ports):
            state = self.folder / f"replica{number}"
            state.mkdir(mode=0o700)
            self.authority.write_serving_files(state, ["127.0.0.1", "localhost"])
            serving = [*shared, "--roles", "answers,updates", "--address", f"127.0.0.1:{port}"]
            serving += ["--set", f"authority_address={self.enrol_address}"]
            log = self.folder / f"replica{number}.log"
            cloud = LocalCloud(model, artefacts, state, log=log, flags=serving)
            self.replicas.append(Replica(number, cloud, port))
        starts = [threading.Thread(target=replica.start) for replica in self.replicas]
        for thread in starts:
            thread.start()
        for thread in starts:
            thread.join()
        self._closes += [replica.cloud.stop for replica in self.replicas if replica.is_up]
        if not all(replica.is_up for replica in self.replicas):
            raise RuntimeError("a replica did not start; see its log")

    def restart_database(self, how: str, seconds: float) -> None:
        """Away for so long, and the time that it takes; after the restart before, where that is not over."""
        with self._restarts:
            begun = time.monotonic()
            self.outages.append((begun, float("inf")))
            self.cluster.stop(how)
            time.sleep(seconds)
            self.cluster.start()
            self.outages[-1] = (begun, time.monotonic())

    def was_away(self, since: float, until: float) -> bool:
        """Whether the database was away at any moment of that time, or in the second before it."""
        return any(begun < until and ended > since - 1 for begun, ended in self.outages)

    def complaints(self) -> list[str]:
        """What the servers' logs say that they should not; of outages they may speak."""
        said = []
        for log in sorted(self.folder.glob("*.log")):
            if log.name == "haproxy.log":
                continue
            for line in log.read_text("utf-8", "replace").splitlines():
                if "Traceback" in line or ("ERROR" in line and "list of devices" not in line):
                    said.append(f"{log.stem}'s log: {line[:300]}")
        return said[:5]

    def close(self) -> None:
        for close in reversed(self._closes):
            close()
        self._closes = []
