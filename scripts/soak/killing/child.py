"""What gets killed: a perfit command, or changes to a vault without end, telling on stdout how far it is.

    python -m soak.killing.child command update --epochs 6
    python -m soak.killing.child changes vault.db SEED

A command prints `opened` when its vault is open or its agent begins, `step N T` when an update has done N
steps (T by the monotonic clock; first the step it begins with) and `done`. Changes print their number once
they are made, and pieces of what rows held before.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_SCRIPTS = Path(__file__).resolve().parents[2]


def start(*arguments: str, env: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
    """This file in a process of its own; its standard output is to be read."""
    return subprocess.Popen(
        [sys.executable, "-m", "soak.killing.child", *arguments],
        env={**os.environ, **(env or {}), "PYTHONPATH": str(_SCRIPTS)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


def command(arguments: list[str]) -> None:
    from perfit_device.agent.client import AgentClient
    from perfit_device.cli import main, progress
    from perfit_device.training import update as updates
    from perfit_device.vault.store import Vault
    from perfit_shared.errors import KEPT_OUT

    def tell_opened(method: Any) -> Any:
        def opened(*args: Any, **how: Any) -> Vault:
            vault: Vault = method(*args, **how)
            print("opened", flush=True)
            return vault

        return opened

    perform = AgentClient.perform

    def performed(*args: Any, **how: Any) -> Any:
        print("opened", flush=True)
        return perform(*args, **how)

    run_update = updates.Update.run

    def run(self: updates.Update) -> updates.Result:
        _tell_step(self.step)
        return run_update(self)

    Vault.open, Vault.create = tell_opened(Vault.open), tell_opened(Vault.create)  # type: ignore[method-assign]
    AgentClient.perform = performed  # type: ignore[method-assign]
    updates.Update.run = run  # type: ignore[method-assign]
    progress.Progress.step = lambda self, step, steps, loss: _tell_step(step)  # type: ignore[method-assign]
    sys.argv = ["perfit", *arguments]
    try:
        main.run()
    except SystemExit as end:
        if end.code not in (0, KEPT_OUT):
            raise
    print("done", flush=True)


def _tell_step(step: int) -> None:
    print(f"step {step} {time.monotonic():.4f}", flush=True)


def changes(path: Path, seed: int) -> None:
    from perfit_device.vault.store import Vault
    from soak.killing.changes import State, pieces_through

    state, told = State.start(seed), set[bytes]()
    with Vault.open(path, state.passphrase) as vault:
        for number in itertools.count(1):
            seen = pieces_through(vault._connection)
            state = state.next()
            state.make(vault)
            print(number, *(piece.hex() for piece in seen - told), flush=True)
            told |= seen


if __name__ == "__main__":
    if sys.argv[1] == "command":
        command(sys.argv[2:])
    else:
        changes(Path(sys.argv[2]), int(sys.argv[3]))
