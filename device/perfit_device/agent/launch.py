"""Starting an agent in the background."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, cast

from perfit_device.file_lock import locked_file
from perfit_device.settings import DeviceSettings
from perfit_shared.errors import Unavailable

__all__ = ["LOCK", "command_for", "start", "stop"]

LOCK = "agent.lock"  # beside the vault; an agent holds it until its process ends
_STOP_SECONDS = 40.0  # an update gets to write its checkpoint
_LARGEST_LOG = 1 << 20  # bytes; a longer one begins anew


def command_for(settings: DeviceSettings, *, unlock: str) -> list[str]:
    """The agent's own program. `unlock`: by what it opens the vault: "stdin", "keyring" or "later"."""
    words = [sys.executable, "-P", "-m", "perfit_device.agent", settings.profile]
    return [*words, "--idle-seconds", f"{settings.agent_idle_seconds:g}", "--unlock", unlock]


def start(settings: DeviceSettings, passphrase: str | None, *, unlock: str = "stdin") -> None:
    """Start the agent of a profile, and return once it listens and has opened the vault.

    It outlives this process and its terminal. Raises what the agent does, such as WrongPassphrase.
    """
    from perfit_device.agent import codec

    log = settings.vault_path.with_name("agent.log")
    stderr = _open_log(log)
    try:
        process = subprocess.Popen(
            command_for(settings, unlock=unlock),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            env=_environment(settings),
            cwd=settings.vault_path.parent,
            start_new_session=True,
            creationflags=getattr(subprocess, "DETACHED_PROCESS", 0),
        )
    finally:
        os.close(stderr)
    said = _exchange(process, (passphrase or "").encode())
    try:
        answer = codec.decode(said, codec.Hello, codec.Failed)
    except codec.Malformed as error:
        raise Unavailable(f"perfit's agent did not start; {log} says more") from error
    if isinstance(answer, codec.Failed):
        raise codec.error_from(answer)


def stop(settings: DeviceSettings) -> bool:
    """End the agent of a profile, an update of it with a checkpoint; whether one ran. Raises Unavailable."""
    from perfit_device.agent.client import connect
    from perfit_device.agent.controls import Stop

    agent = connect(settings, any_version=True)
    if agent is not None:
        with agent:
            agent.perform(Stop())
    end = time.monotonic() + _STOP_SECONDS
    while settings.vault_path.exists():
        with locked_file(settings.vault_path.with_name(LOCK)) as is_ours:
            if is_ours:
                break
        if time.monotonic() > end:
            who = "" if agent is None else f", process {agent.hello.pid},"
            raise Unavailable(f"the agent{who} does not end; end it yourself")
        time.sleep(0.05)
    return agent is not None


def _exchange(process: subprocess.Popen[bytes], given: bytes) -> bytes:
    """What it says until it closes its output: it then works on, or has ended."""
    stdin, stdout = cast(IO[bytes], process.stdin), cast(IO[bytes], process.stdout)  # both are pipes
    with contextlib.suppress(OSError):  # it ended before it read
        stdin.write(given)
        stdin.close()
    with stdout:
        said = stdout.read()
    process.returncode = 0  # nobody here waits for its end
    return said


def _open_log(path: Path) -> int:
    """For its owner's eyes only."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0)
    descriptor = os.open(path, flags, 0o600)
    if os.fstat(descriptor).st_size > _LARGEST_LOG:
        os.ftruncate(descriptor, 0)
    return descriptor


def _environment(settings: DeviceSettings) -> dict[str, str]:
    """Without passphrases, and with the home's whole path, since the agent runs elsewhere."""
    kept = {key: value for key, value in os.environ.items() if "PASSPHRASE" not in key}
    return kept | {"PERFIT_HOME": str(settings.home.absolute())}
