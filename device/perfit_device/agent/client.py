"""Operations at an agent: a `Performer` over its socket."""

from __future__ import annotations

import threading
from multiprocessing.connection import Client, Connection
from queue import SimpleQueue
from typing import Any, Self, TypeVar

import msgspec

from perfit_device import __version__
from perfit_device.agent import codec
from perfit_device.agent.address import FAMILY, address_of, hang_up, is_same_user
from perfit_device.operations.operation import Emit, Operation
from perfit_device.settings import DeviceSettings
from perfit_shared.errors import ConfigError, InvalidInput, Unavailable

__all__ = ["AgentClient", "connect"]

Result = TypeVar("Result")
_HELLO_SECONDS = 10.0  # for an agent on a machine that is busy


def connect(settings: DeviceSettings, *, any_version: bool = False) -> AgentClient | None:
    """None where no agent of this profile answers.

    Raises ConfigError where another user's answers, or one of another version of perfit unless
    `any_version`, Busy where it has too many callers, and Unavailable where it stands still.
    """
    try:
        connection = Client(address_of(settings), FAMILY)
    except OSError:  # there is no socket, or a process that has ended left it
        return None
    try:
        if not is_same_user(connection):
            raise ConfigError("another user's process listens in the place of this profile's agent")
        if not connection.poll(_HELLO_SECONDS):
            raise Unavailable("perfit's agent does not answer; try again, or end its process")
        hello = codec.decode(connection.recv_bytes(codec.LARGEST), codec.Hello, codec.Failed)
        if isinstance(hello, codec.Failed):
            raise codec.error_from(hello)
        if hello.version != __version__ and not any_version:
            raise ConfigError(
                f"an agent of perfit {hello.version} runs, and this is {__version__}; "
                "`perfit agent stop` ends it, and the next command starts anew"
            )
    except (EOFError, ConnectionError):  # it ends just now
        connection.close()
        return None
    except BaseException:
        connection.close()
        raise
    return AgentClient(connection, hello, settings.task)


class AgentClient:
    """A connection to an agent. One operation at a time; use `with`."""

    def __init__(self, connection: Connection, hello: codec.Hello, task: str | None = None) -> None:
        """`task` is meant where an operation names none."""
        self.hello = hello
        self._task = task
        self._connection = connection
        self._closing = threading.Lock()
        self._received: SimpleQueue[Any] = SimpleQueue()  # messages, and an error behind the last
        # Ctrl-C in the middle of a message would lose its beginning, so it is read in another thread.
        threading.Thread(target=self._read, name="perfit-agent", daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Cancels what runs."""
        with self._closing:
            if not self._connection.closed:
                hang_up(
                    self._connection
                )  # the thread that reads closes it: its number may not be another's yet

    def perform(self, operation: Operation[Result], emit: Emit = lambda _: None) -> Result:
        """Raises what the operation raises at the agent. Ctrl-C here ends it there, and not the agent.

        Raises Unavailable when the agent goes away, or ends the operation by itself.
        """
        self._send(codec.call_of(operation, self._task))
        was_interrupted = False
        while True:
            try:
                message = self._next()
                if isinstance(message, codec.Happened):
                    emit(codec.event_from(message))
                    continue
            except KeyboardInterrupt:
                if was_interrupted:
                    raise
                was_interrupted = True  # what it still has to say, and how it ends, comes
                self._send(codec.Cancel())
                continue
            except BaseException:
                self.close()
                raise
            if isinstance(message, codec.Failed):
                error = codec.error_from(message)
                if isinstance(error, KeyboardInterrupt) and not was_interrupted:
                    raise Unavailable(
                        "perfit's agent was stopped, or locked by `perfit lock --now`; try again"
                    )
                raise error
            result: Result = codec.result_from(message, operation)
            return result

    def _next(self) -> codec.Happened | codec.Done | codec.Failed:
        message = self._received.get()
        if isinstance(message, BaseException):
            self._received.put(message)
            raise Unavailable("perfit's agent went away; try again") from message
        found: codec.Happened | codec.Done | codec.Failed
        found = codec.decode(message, codec.Happened, codec.Done, codec.Failed)
        return found

    def _send(self, message: msgspec.Struct) -> None:
        data = codec.encode(message)
        if len(data) > codec.LARGEST:
            raise InvalidInput(f"this is more than {codec.LARGEST >> 20} MiB; give less at a time")
        try:
            self._connection.send_bytes(data)
        except OSError as error:
            raise Unavailable("perfit's agent went away; try again") from error

    def _read(self) -> None:
        try:
            while True:
                self._received.put(self._connection.recv_bytes(codec.LARGEST))
        except (EOFError, OSError) as error:
            with self._closing:
                self._connection.close()
            self._received.put(error)
