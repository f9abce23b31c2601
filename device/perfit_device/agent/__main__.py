"""`python -m perfit_device.agent PROFILE`: the agent's own process. `perfit agent start` starts it.

On standard output comes one message, Hello once it listens or Failed, and then its end.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from multiprocessing.connection import Listener
from pathlib import Path
from typing import TYPE_CHECKING

from perfit_device import process_limits
from perfit_device.settings import DeviceSettings, prepare_process
from perfit_shared.errors import PerfitError

if TYPE_CHECKING:
    from perfit_device.agent.server import AgentServer

_BACKLOG = 64


def main() -> int:
    prepare_process()
    process_limits.limit_process()  # before numpy is imported
    os.umask(0o077)
    parser = argparse.ArgumentParser(prog="perfit agent")
    parser.add_argument("profile")
    parser.add_argument("--idle-seconds", type=float, default=15 * 60.0)
    parser.add_argument("--unlock", choices=("stdin", "keyring", "later"), default="later")
    words = parser.parse_args()
    from perfit_device.agent import codec

    try:
        settings = DeviceSettings.from_environment(words.profile)
        settings.check_exists()
        with _only_agent(settings), _listener(settings) as listener:
            _serve(listener, settings, words)
        return 0
    except BaseException as error:
        log(f"ended: {codec.place_of(error)}")
        _say(codec.encode(codec.failed_by(error)))
        return 1


def _serve(listener: Listener, settings: DeviceSettings, words: argparse.Namespace) -> None:
    from perfit_device.agent import codec
    from perfit_device.agent.server import AgentServer

    threading.excepthook = lambda args: log(f"failed: {codec.place_of(args.exc_value or RuntimeError())}")
    server = AgentServer(settings, idle_seconds=words.idle_seconds, log=log)
    for name in ("SIGTERM", "SIGHUP", "SIGINT"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), lambda *_: server.interrupt())
    _wake_on_signals(server)
    if words.unlock == "stdin":
        server.unlock(sys.stdin.buffer.read())
    elif words.unlock == "keyring":
        try:
            server.unlock(None)
        except PerfitError as error:  # at login the keyring may be locked itself
            log(f"stays locked: {error.code}")
    log("listens")
    _say(codec.encode(server.hello()))
    server.run(listener)


def _wake_on_signals(server: AgentServer) -> None:
    """Python's handlers run in the main thread, and the system may give a signal to another one.

    Then nothing would end the main thread's wait for connections. A byte for each signal comes here.
    """
    if os.name == "nt":  # where a signal is an event that no thread gets
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

    def wake() -> None:
        while os.read(reader, 1):
            server.wake()

    threading.Thread(target=wake, name="signals", daemon=True).start()


@contextlib.contextmanager
def _only_agent(settings: DeviceSettings) -> Iterator[None]:
    from perfit_device.agent.launch import LOCK
    from perfit_device.file_lock import locked_file
    from perfit_shared.errors import Busy
    from perfit_shared.ownership import check_ownership

    check_ownership(settings.vault_path)
    with locked_file(settings.vault_path.with_name(LOCK)) as is_ours:
        if not is_ours:
            raise Busy("an agent of this profile runs already")
        yield


def _listener(settings: DeviceSettings) -> Listener:
    """Ours is the lock, so a socket that lies there is nobody's any more."""
    from perfit_device.agent.address import FAMILY, address_of

    address = address_of(settings, make=True)
    if FAMILY == "AF_UNIX":
        Path(address).unlink(missing_ok=True)
    listener = Listener(address, FAMILY, backlog=_BACKLOG)
    if FAMILY == "AF_UNIX":
        Path(address).chmod(0o600)
    return listener


def log(text: str) -> None:
    """A line for whoever looks after this process."""
    with contextlib.suppress(OSError):
        print(f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ} {text}", file=sys.stderr, flush=True)


def _say(message: bytes) -> None:
    """To whoever started this process, who then reads no further."""
    with contextlib.suppress(OSError):
        sys.stdout.buffer.write(message)
        sys.stdout.flush()
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    os.close(null)


if __name__ == "__main__":
    sys.exit(main())
