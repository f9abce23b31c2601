"""A cloud and devices as separate processes on this machine, driven by their commands."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from perfit_shared.errors import KEPT_OUT, Unavailable, exit_code

BIN = Path(sys.executable).parent
# Exit codes of commands that did their work: the gate kept an update out, the cloud is away.
FINE = {"update": KEPT_OUT, "status": exit_code(Unavailable(""))}
PASSPHRASE = "a passphrase for this run only"  # noqa: S105 - protects nothing but the demo


class CommandFailed(RuntimeError):
    """A command ended with another code than 0; holds what it said."""

    def __init__(self, command: Sequence[str], code: int, said: str) -> None:
        super().__init__(f"{' '.join(command)[:200]} ended with {code}: {said.strip()[-2000:]}")
        self.code, self.said = code, said


def run(
    command: Sequence[str], *, env: dict[str, str] | None = None, text: str | None = None, fine: int = 0
) -> str:
    """Standard output of a command. Raises CommandFailed with what it said on standard error.

    `fine` is an exit code beside 0 that is no failure.
    """
    done = subprocess.run(
        [*command], env={**os.environ, **(env or {})}, input=text, capture_output=True, text=True, check=False
    )
    if done.returncode not in (0, fine):
        raise CommandFailed(command, done.returncode, done.stderr or done.stdout)
    return done.stdout


class LocalCloud:
    """`perfit-cloud serve` on free ports of loopback, for the length of a with block."""

    def __init__(
        self,
        model: Path | str | None,
        artefacts: Sequence[Path],
        state: Path,
        *,
        log: Path | None = None,
        flags: Sequence[str] = (),
        env: dict[str, str] | None = None,
        prefix: Sequence[str] = (),
    ) -> None:
        """`model`: None takes the one that is served by default. `env`: beside this process's environment.
        `prefix`: a command that runs ours, such as prlimit.
        """
        self.state, self.log = state, log or state.with_suffix(".log")
        self._env, self._prefix = env or {}, prefix
        # A cloud that ran before comes back where its devices look for it.
        known = state / "addresses.json"
        ports = json.loads(known.read_text()) if known.exists() else {}
        address, enrol_address = (ports.get(k, "127.0.0.1:0") for k in ("address", "enrol_address"))
        self.command = [
            str(BIN / "perfit-cloud"),
            "serve",
            "--state",
            str(state),
            "--json",
            "--address",
            address,
            "--enrol-address",
            enrol_address,
            *flags,
        ]
        if model is not None:
            self.command += ["--model", str(model)]
        for artefact in artefacts:
            self.command += ["--artefact", str(artefact)]
        self.said: dict[str, Any] = {}

    def start(self) -> LocalCloud:
        self.state.parent.mkdir(parents=True, exist_ok=True)
        self.process = self.launch(self.log, self._env)
        line = self.process.stdout.readline() if self.process.stdout else ""
        if not line.strip():
            code = self.process.wait(30)
            raise CommandFailed(self.command, code, self.log.read_text())
        self.said = json.loads(line)
        return self

    def launch(self, log: Path, env: dict[str, str]) -> Any:
        """The process, its standard output a pipe and its standard error added to `log`."""
        with log.open("a") as errors:
            return subprocess.Popen(
                [*self._prefix, *self.command],
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={**os.environ, **env},
            )

    def at_the_same_ports(self) -> LocalCloud:
        """The same cloud again, after `kill` or `stop`, where devices look for it."""
        for flag, key in (("--address", "address"), ("--enrol-address", "enrol_address")):
            self.command[self.command.index(flag) + 1] = self.said[key]
        return self.start()

    def invite(self, *flags: str) -> str:
        return self._run("invite", *flags).strip()

    def revoke(self, identity: str) -> None:
        self._run("revoke", identity)

    def _run(self, command: str, *arguments: str) -> str:
        whole = [str(BIN / "perfit-cloud"), command, "--state", str(self.state), *arguments]
        return run(whole, env=self._env)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(30)

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.kill()

    def __enter__(self) -> LocalCloud:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


class Device:
    """One person's device: a profile in a home of its own."""

    def __init__(self, home: Path, profile: str) -> None:
        self.env = {"PERFIT_HOME": str(home), "PERFIT_PASSPHRASE": PASSPHRASE, "NO_COLOR": "1"}
        self.profile = profile

    def command(self, *args: str) -> list[str]:
        return [str(BIN / "perfit"), "--profile", self.profile, *args]

    def __call__(self, *args: str, text: str | None = None) -> str:
        fine = FINE.get(args[0], 0)
        return run(self.command(*args), env=self.env, text=text, fine=fine)

    def json(self, *args: str) -> Any:
        return json.loads(self(*args, "--json"))

    def popen(self, *args: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.command(*args),
            env={**os.environ, **self.env},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
