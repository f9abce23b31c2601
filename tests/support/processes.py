"""Commands in processes of their own: started as users start them, or forked where libraries are loaded.

Loading torch and transformers takes seconds of CPU. A test that is about how the program starts (its
allocator, its signals, what it loads) takes `RUN`; one that is about what a running cloud does, or about a
mistake that it names, takes `fork`. So do a device's commands, whose key derivation is cheap then.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from local import FINE, CommandFailed, Device, LocalCloud

RUN = [sys.executable, "-c", "from perfit_cloud.cli.main import run; run()"]
_HARDENING_OFF = "hardening is off"  # a fork cannot begin with another allocator; the log says so
_LOADED = [
    "perfit_cloud.cli.serve",
    "perfit_cloud.service.server",
    "perfit_cloud.engine.generation.continuous",
    "perfit_device.cli.main",
    "perfit_device.operations",
    "sklearn",
]
_PACKAGES = {"perfit": "perfit_device", "perfit-cloud": "perfit_cloud"}
_CHEAP = "from perfit_device.vault.crypto import KdfParams; KdfParams.__init__.__defaults__ = (32, 1, 4)"


class Forked:
    """A command under way, with the methods of `subprocess.Popen` that tests use."""

    def __init__(self, process: Any, stdout: TextIO, errors: Path) -> None:
        self._process, self.stdout, self._errors = process, stdout, errors
        self.pid: int = process.pid

    @property
    def returncode(self) -> int | None:
        code: int | None = self._process.exitcode
        return code

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("perfit-cloud", timeout or 0)
        return self.returncode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def terminate(self) -> None:
        self._process.terminate()

    def kill(self) -> None:
        self._process.kill()

    def errors(self) -> str:
        """What it wrote to standard error, but for the line about hardening."""
        lines = self._errors.read_text().splitlines(keepends=True)
        return "".join(line for line in lines if _HARDENING_OFF not in line)


def fork(
    *words: str,
    errors: Path,
    program: str = "perfit-cloud",
    before: str = "",
    text: str = "",
    env: Mapping[str, str] | None = None,
) -> Forked:
    """The program with these words, after the code `before`; `text` is its standard input, and its standard
    error is added to `errors`.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_LOADED)
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PERFIT")}
    ours = {"PERFIT_CLOUD_HARDENING": "off", "PERFIT_CLOUD_DTYPE": "float32"}
    environment = {**inherited, **ours, **(env or {})}
    reader, writer = context.Pipe(duplex=False)
    code = f"{before}\nfrom {_PACKAGES[program]}.cli.main import run\nrun()"
    given = ([program, *words], code, text, environment, writer, errors)
    process = context.Process(target=_command, args=given, daemon=True)
    process.start()
    writer.close()
    return Forked(process, os.fdopen(os.dup(reader.fileno())), errors)


def _command(
    words: list[str], code: str, text: str, environment: dict[str, str], out: Any, errors: Path
) -> None:
    gc.freeze()  # the libraries: a collection would copy every page of them
    os.dup2(out.fileno(), 1)
    with errors.open("a") as file, tempfile.TemporaryFile() as given:
        os.dup2(file.fileno(), 2)
        given.write(text.encode())
        given.seek(0)
        os.dup2(given.fileno(), 0)
    out.close()
    sys.stdin, sys.stdout, sys.stderr = (open(at, "rww"[at], closefd=False) for at in range(3))  # noqa: SIM115
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = words
    exec(code, {"__name__": "__main__"})  # noqa: S102


class ForkedCloud(LocalCloud):
    """A `LocalCloud` that starts in a fraction of a second, without the hardening of a real one."""

    def launch(self, log: Path, env: dict[str, str]) -> Forked:
        return fork(*self.command[1:], errors=log, env=env)

    def _run(self, command: str, *arguments: str) -> str:
        return _whole("perfit-cloud", command, "--state", str(self.state), *arguments, env=self._env)


class ForkedDevice(Device):
    """A `Device` whose commands start in a fraction of a second; those of `popen` are whole processes."""

    def __call__(self, *args: str, text: str | None = None) -> str:
        words = self.command(*args)[1:]
        fine = FINE.get(args[0], 0)
        return _whole("perfit", *words, before=_CHEAP, text=text or "", env=self.env, fine=fine)


def _whole(program: str, *words: str, fine: int = 0, **how: Any) -> str:
    """As `local.run`."""
    with tempfile.TemporaryDirectory() as folder:
        process = fork(*words, program=program, errors=Path(folder, "errors"), **how)
        out = process.stdout.read()
        code = process.wait(60)
        if code not in (0, fine):
            raise CommandFailed([program, *words], code, process.errors() or out)
    return out
