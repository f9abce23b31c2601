"""HAProxy and Envoy as processes, with the files that deploy/ ships."""

from __future__ import annotations

import grp
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.waiting import wait_for

ROOT = Path(__file__).parents[2]
HAPROXY_FILE = ROOT / "deploy" / "haproxy" / "haproxy.cfg"
ENVOY_FILE = ROOT / "deploy" / "envoy" / "envoy.yaml"

needs_haproxy = pytest.mark.skipif(shutil.which("haproxy") is None, reason="haproxy is not installed")


def envoy() -> str:
    """The program; skips where there is none."""
    beside = Path(sys.executable).with_name("envoy")
    found = str(beside) if beside.exists() else shutil.which("envoy")
    if found is None:
        pytest.skip("envoy is not installed")
    return found


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        port: int = found.getsockname()[1]
    return port


def answers(port: int) -> Callable[[], bool]:
    def check() -> bool:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            return False
        return True

    return check


def environment_of(
    *, devices: int, enrol: int, enrolment: tuple[str, int], replicas: Sequence[tuple[str, int]]
) -> dict[str, str]:
    """What the shipped haproxy.cfg reads. A server: (host:port, port of its page); three replicas at most."""
    replicas = [*replicas, *[("127.0.0.1:1", 1)] * (3 - len(replicas))]
    found = {
        "PERFIT_DEVICES": f"127.0.0.1:{devices}",
        "PERFIT_ENROL": f"127.0.0.1:{enrol}",
        "PERFIT_ENROL_1": enrolment[0],
        "PERFIT_ENROL_CHECK_1": str(enrolment[1]),
        "PERFIT_MAXCONN": "500",
    }
    for number, (address, page) in enumerate(replicas, start=1):
        found |= {f"PERFIT_REPLICA_{number}": address, f"PERFIT_CHECK_{number}": str(page)}
    return found


def user_and_group() -> dict[str, str]:
    """What the shipped haproxy.cfg reads: nothing where it can be the file's own user, or else ourselves."""
    me = os.geteuid()
    if me == 0 and any(user.pw_name == "haproxy" for user in pwd.getpwall()):
        return {}
    return {"PERFIT_USER": pwd.getpwuid(me).pw_name, "PERFIT_GROUP": grp.getgrgid(os.getegid()).gr_name}


@contextmanager
def haproxy(
    *, environment: dict[str, str], ports: Sequence[int], more: str = ""
) -> Iterator[Callable[[], None]]:
    """Runs the shipped file, and `more` behind it; the function reloads it without a gap."""
    with tempfile.TemporaryDirectory(prefix="perfit-haproxy-") as folder:
        files = ["-f", str(HAPROXY_FILE)]
        if more:
            (Path(folder) / "more.cfg").write_text(more)
            files += ["-f", f"{folder}/more.cfg"]
        process = subprocess.Popen(
            ["haproxy", "-W", "-S", f"{folder}/master.sock", *files],
            env=os.environ | environment | user_and_group() | {"PERFIT_RUN": folder},
        )
        try:
            for port in ports:
                wait_for(answers(port))
            yield lambda: process.send_signal(signal.SIGUSR2)
        finally:
            process.terminate()
            process.wait(20)


@contextmanager
def envoy_process(changes: dict[str, str], ports: Sequence[int]) -> Iterator[None]:
    """Runs the shipped file with these texts in place of others."""
    text = ENVOY_FILE.read_text()
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    with tempfile.TemporaryDirectory(prefix="perfit-envoy-") as folder:
        file = Path(folder) / "envoy.yaml"
        file.write_text(text)
        command = [
            envoy(),
            "-c",
            str(file),
            "--base-id",
            str(free_port()),
            "--concurrency",
            "1",
            "-l",
            "error",
        ]
        process = subprocess.Popen(command)
        try:
            for port in ports:
                wait_for(answers(port))
            yield
        finally:
            process.terminate()
            process.wait(20)
