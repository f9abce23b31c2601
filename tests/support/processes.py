"""Commands in processes of their own: started as users start them, or forked where libraries are loaded.

Loading torch and transformers takes seconds of CPU. A test that is about how the program starts (its
allocator, its signals, what it loads) takes `RUN`; one that is about what a running cloud does, or about a
mistake that it names, takes `fork`.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from local import LocalCloud

RUN = [sys.executable, "-c", "from perfit_cloud.cli.main import run; run()"]
_HARDENING_OFF = "hardening is off"  # a fork cannot begin with another allocator; the log says so
_LOADED = [
    "perfit_cloud.cli.serve",
    "perfit_cloud.service.server",
    "perfit_cloud.engine.generation.continuous",
    "sklearn",
]


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


def fork(*words: str, errors: Path, before: str = "", env: Mapping[str, str] | None = None) -> Forked:
    """`perfit-cloud` with these words, after the code `before`; standard error is added to `errors`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_LOADED)
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PERFIT")}
    ours = {"PERFIT_CLOUD_HARDENING": "off", "PERFIT_CLOUD_DTYPE": "float32"}
    environment = {**inherited, **ours, **(env or {})}
    reader, writer = context.Pipe(duplex=False)
    process = context.Process(target=_command, args=(words, before, environment, writer, errors), daemon=True)
    process.start()
    writer.close()
    return Forked(process, os.fdopen(os.dup(reader.fileno())), errors)


def _command(words: list[str], before: str, environment: dict[str, str], out: Any, errors: Path) -> None:
    os.dup2(out.fileno(), 1)
    with errors.open("a") as file:
        os.dup2(file.fileno(), 2)
    out.close()
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["perfit-cloud", *words]
    exec(before + "\nfrom perfit_cloud.cli.main import run\nrun()", {"__name__": "__main__"})  # noqa: S102


class ForkedCloud(LocalCloud):
    """A `LocalCloud` that starts in a fraction of a second, without the hardening of a real one."""

    def launch(self, log: Path, env: dict[str, str]) -> Forked:
        return fork(*self.command[1:], errors=log, env=env)
