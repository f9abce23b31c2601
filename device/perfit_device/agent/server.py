"""The agent: one process that keeps a profile open, and performs operations for whoever connects.

A connection has two threads: one reads, so that it notices a caller who leaves, and one works. Whatever a
connection sends that is no message of ours ends that connection alone. Its log has no text of a person's.
"""

from __future__ import annotations

import contextlib
import os
import signal
import struct
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any, TypeVar, cast

import msgspec

from perfit_device import __version__, process_limits
from perfit_device.agent import codec
from perfit_device.agent.address import FAMILY, is_same_user
from perfit_device.agent.controls import AgentState, Control
from perfit_device.agent.timer import Timer
from perfit_device.cancellation import Cancellation
from perfit_device.operations.operation import Emit, Operation, Service
from perfit_device.profile import Profile, default_task
from perfit_device.settings import DeviceSettings
from perfit_device.vault.store import Vault
from perfit_shared.errors import Busy, Locked, PerfitError, Unavailable, WrongPassphrase

__all__ = ["AgentServer"]

Result = TypeVar("Result")
_MOST_CONNECTIONS = 64
_SEND_SECONDS = 120  # that a caller may leave its end unread
_STOP_SECONDS = 30.0  # that operations get to save what they have
_SIGNAL_SECONDS = 1.0  # in which the main thread has heard of a signal
_LOOK_SECONDS = 15.0  # between two looks at whether it is idle


def _now() -> float:
    """Seconds that also count while the machine sleeps, where the system tells."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


class AgentServer:
    """A `Performer` that may be locked: then it has neither key nor channel, and `perform` raises Locked."""

    def __init__(self, settings: DeviceSettings, *, idle_seconds: float, log: Callable[[str], None]) -> None:
        """`idle_seconds`: unused for so long it locks itself; 0: never."""
        self.settings = settings
        self._idle_seconds = idle_seconds
        self._log = log
        self._lock = threading.RLock()  # of the next five
        self._profile: Profile | None = None
        self._is_locking = False  # it locks when the last operation ends
        self._is_unlocked_to_update = False  # by the keyring, and for nothing else
        self._running: list[Cancellation] = []  # of operations
        self._last_used = _now()
        self._services: set[Cancellation] = set()
        self._answering = 0  # callers who wait for the end of an operation
        self._is_free = threading.Condition(self._lock)
        self._connections = threading.Semaphore(_MOST_CONNECTIONS)
        self._stopping = threading.Event()
        self._address: Any = None
        self._is_accepting = False
        self._vault_lock = Vault.lock_of(settings.vault_path, costly=settings.costly_vault)

    # -- locked and unlocked -------------------------------------------------------------------

    @property
    def is_locked(self) -> bool:
        return self._profile is None or self._is_locking

    def unlock(self, passphrase: bytes | None) -> None:
        """Open the profile. Raises as `Profile.open` does."""
        try:
            given = None if passphrase is None else passphrase.decode()
        except UnicodeDecodeError as error:
            raise WrongPassphrase("a passphrase should be text in UTF-8") from error
        with self._lock:
            if self._profile is not None and self._is_locking:
                with self._profile.vault() as vault:
                    vault.check_passphrase(given)
            elif self._profile is None:
                self._profile = Profile.open(self.settings, passphrase=lambda: given or "", keeps_vault=True)
                process_limits.release_memory()  # the key derivation's
            self._is_locking = self._is_unlocked_to_update = False
            self._last_used = _now()
        self._log("unlocked")

    def unlock_by_keyring(self) -> bool:
        """To update; whether it could. A vault locked by a passphrase stays locked."""
        if self._vault_lock != "keyring" or self._stopping.is_set():
            return False
        with self._lock, contextlib.suppress(PerfitError):
            self.unlock(None)
            self._is_unlocked_to_update = True
        return not self.is_locked

    def lock(self, *, now: bool = False) -> None:
        """Nothing new from here on; the vault closes when the last operation has ended."""
        with self._lock:
            self._is_locking = self._profile is not None
            running = list(self._running) if now else []
            self._close_unused()
        for cancellation in running:
            cancellation.cancel()

    def _close_unused(self) -> None:
        if self._is_locking and not self._running and self._profile is not None:
            profile, self._profile, self._is_locking = self._profile, None, False
            try:
                with profile.vault() as vault:
                    self._vault_lock = vault.lock  # a passphrase may have taken the keyring's place
                profile.close()
            except (PerfitError, OSError) as error:  # its file may be gone
                self._log(f"while it closed the vault: {codec.place_of(error)}")
            process_limits.release_memory()
            self._log("locked")

    def is_idle(self) -> bool:
        """Whether it is unlocked, and unused for so long that it should lock itself."""
        is_unused = not self._running and _now() - self._last_used >= self._idle_seconds > 0
        return is_unused and self._profile is not None

    def lock_if_idle(self) -> None:
        with self._lock:
            if self.is_idle():
                self.lock()

    def state(self) -> AgentState:
        return AgentState(os.getpid(), self.is_locked, len(self._running), self._idle_seconds)

    def hello(self) -> codec.Hello:
        return codec.Hello(__version__, os.getpid(), self.is_locked, self._vault_lock)

    # -- operations ----------------------------------------------------------------------------

    def perform(self, operation: Operation[Result], emit: Emit = lambda _: None) -> Result:
        """What services call, from any thread; its scope's `Cancellation` ends it. Raises Locked."""
        return self.perform_for(Cancellation.current() or Cancellation(), operation, emit)

    def perform_for(self, caller: Cancellation, operation: Operation[Result], emit: Emit) -> Result:
        """For a caller who may cancel."""
        if isinstance(operation, Control):
            return cast(Result, operation.apply(self))
        with caller.scope():
            if isinstance(operation, Service):
                with self._serving(caller):
                    return cast(Result, operation.serve(self, emit))
            with self._using(caller) as profile:
                return profile.perform(operation, emit)

    @contextlib.contextmanager
    def hold(self) -> Iterator[Profile]:
        """For an update by itself, which is no use: it puts off no idle lock.

        Where the agent was locked, or would be by now, it locks at once: what holds it goes on to its end,
        and nobody else gets in.
        """
        caller, is_over = Cancellation(), self._is_unlocked_to_update or self.is_idle()
        with caller.scope(), self._using(caller, is_use=False) as profile:
            if is_over:
                self.lock()
            yield profile

    @contextlib.contextmanager
    def _using(self, caller: Cancellation, *, is_use: bool = True) -> Iterator[Profile]:
        if is_use:
            self.lock_if_idle()  # the machine may have slept
        with self._lock:
            if self._profile is None or self._is_locking:
                raise Locked("the profile is locked; `perfit unlock` opens it")
            profile = self._profile
            self._running.append(caller)
        try:
            yield profile
        finally:
            with self._lock:
                self._running.remove(caller)
                self._last_used = _now() if is_use else self._last_used
                self._close_unused()
                self._is_free.notify_all()
            process_limits.release_memory()

    @contextlib.contextmanager
    def _serving(self, caller: Cancellation) -> Iterator[None]:
        with self._lock:
            self._services.add(caller)
        try:
            yield
        except KeyboardInterrupt:
            if self._stopping.is_set():  # its caller did not ask for the end
                raise Unavailable(
                    "perfit's agent stopped, and what it served with it; start it again"
                ) from None
            raise
        finally:
            with self._lock:
                self._services.discard(caller)

    # -- connections ---------------------------------------------------------------------------

    def run(self, listener: Listener) -> None:
        """Serve until `stop`; then operations end, updates with a checkpoint, and the vault closes."""
        self._address = listener.address
        threading.Thread(target=self._watch, name="idle", daemon=True).start()
        try:
            while not self._stopping.is_set():
                self._accept(listener)
        except KeyboardInterrupt:
            pass
        finally:
            with contextlib.suppress(FileNotFoundError):  # somebody took the socket away
                listener.close()
            self._end()

    def stop(self) -> None:
        """From any thread."""
        self._stopping.set()
        if FAMILY == "AF_UNIX":
            # To a process it may go to this thread, and the main one would wait on.
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
        else:
            with contextlib.suppress(OSError):
                Client(self._address, FAMILY).close()

    def wake(self) -> None:
        """After a signal, from another thread: the main one handles it, unless it has not heard of it."""
        if not self._stopping.wait(_SIGNAL_SECONDS) and self._is_accepting and FAMILY == "AF_UNIX":
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)

    def interrupt(self) -> None:
        """In a signal's handler: ends the main thread's wait for connections, and nothing else."""
        self._stopping.set()
        if self._is_accepting:
            raise KeyboardInterrupt

    def _accept(self, listener: Listener) -> None:
        self._is_accepting = True
        try:
            if self._stopping.is_set():
                return
            connection = listener.accept()
        except OSError:  # it left already, or there are too many open files
            self._stopping.wait(0.05)
            return
        finally:
            self._is_accepting = False
        if self._stopping.is_set() or not is_same_user(connection):
            connection.close()
        elif not self._connections.acquire(blocking=False):
            with contextlib.suppress(OSError):
                refusal = Busy("perfit's agent has too many connections; end some of your apps")
                connection.send_bytes(codec.encode(codec.failed_by(refusal)))
            connection.close()
        else:
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    @contextlib.contextmanager
    def answering(self) -> Iterator[None]:
        """While a caller waits for the end of an operation: this process ends after it."""
        with self._lock:
            self._answering += 1
        try:
            yield
        finally:
            with self._lock:
                self._answering -= 1
                self._is_free.notify_all()

    def _serve(self, connection: Connection) -> None:
        try:
            _Caller(self, connection, self._log).serve()
        finally:
            self._connections.release()

    def _watch(self) -> None:
        timer = Timer(self, now=_now, log=self._log)
        while not self._stopping.wait(min(_LOOK_SECONDS, self._idle_seconds or _LOOK_SECONDS)):
            if not self.settings.vault_path.exists():  # its socket may lie elsewhere, where paths are long
                self._log("its profile is gone")
                self.stop()
            if FAMILY == "AF_UNIX" and not Path(self._address).exists():
                self._log("its socket is gone")  # nobody can reach it
                self.stop()
            timer.look()

    def _end(self) -> None:
        self.lock(now=True)
        with self._lock:
            services = list(self._services)
        for service in services:
            service.cancel()
        with self._lock:
            self._is_free.wait_for(lambda: not self._running and not self._answering, _STOP_SECONDS)
        self._log("stopped")


class _Caller:
    """One connection."""

    def __init__(self, server: AgentServer, connection: Connection, log: Callable[[str], None]) -> None:
        self._server = server
        self._connection = connection
        self._log = log
        self._sending = threading.Lock()
        self._running: Cancellation | None = None
        _limit_sending(connection)

    def serve(self) -> None:
        """Until the other side leaves, or sends what is no message."""
        try:
            self._send(self._server.hello())
            while True:
                message = codec.decode(self._connection.recv_bytes(codec.LARGEST), codec.Call, codec.Cancel)
                running = self._running
                if isinstance(message, codec.Call):
                    self._begin(message, running)
                elif running is not None:
                    running.cancel()
        except (EOFError, OSError):
            pass
        except codec.Malformed:
            self._log("a connection sent what is no request, and was closed")
        finally:
            if (running := self._running) is not None:
                running.cancel()
            with self._sending:
                self._connection.close()

    def _begin(self, call: codec.Call, running: Cancellation | None) -> None:
        if running is not None:
            raise codec.Malformed("one operation at a time")
        try:
            operation = codec.operation_from(call)
        except PerfitError as error:  # what a request checks by itself
            self._send(codec.failed_by(error))
            return
        self._running = Cancellation()
        threading.Thread(target=self._work, args=(operation, self._running, call.task), daemon=True).start()

    def _work(self, operation: Operation[Any], cancellation: Cancellation, task: str | None) -> None:
        default_task.set(task)  # of this thread

        def emit(event: Any) -> None:
            cancellation.check(again=False)
            try:
                self._send(codec.happened(event))
            except OSError:
                cancellation.cancel()  # the caller has left
                cancellation.check()

        with self._server.answering():
            end = self._end_of(operation, cancellation, emit)
            self._running = None
            with contextlib.suppress(OSError):
                self._send(end)

    def _end_of(self, operation: Operation[Any], cancellation: Cancellation, emit: Emit) -> msgspec.Struct:
        try:
            return codec.result_of(self._server.perform_for(cancellation, operation, emit))
        except BaseException as error:
            if not isinstance(error, PerfitError | KeyboardInterrupt):
                self._log(f"{type(operation).__name__} failed: {codec.place_of(error)}")
            return codec.failed_by(error)

    def _send(self, message: msgspec.Struct) -> None:
        with self._sending:
            self._connection.send_bytes(codec.encode(message))


def _limit_sending(connection: Connection) -> None:
    """A caller that reads nothing, such as a stopped one, must not keep an operation for ever."""
    if FAMILY == "AF_UNIX":
        import socket

        with socket.socket(fileno=os.dup(connection.fileno())) as plain:
            plain.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", _SEND_SECONDS, 0))
