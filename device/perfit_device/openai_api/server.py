"""The endpoint on a socket of its own, in a thread.

with Endpoint(performer, EndpointSettings(), token) as endpoint:
    print(endpoint.url)
    endpoint.wait()
"""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from perfit_device.cancellation import waiting
from perfit_device.openai_api.guard import Guard, Rules
from perfit_device.openai_api.routes import routes
from perfit_device.openai_api.work import Work
from perfit_device.operations.operation import Performer
from perfit_shared.errors import ConfigError

__all__ = ["Endpoint", "EndpointSettings"]

_HEAD_BYTES = 32 << 10  # of a request's line and headers
_HEAD_SECONDS = 10.0  # that they may take to arrive, and an idle connection may stay open
_CONNECTIONS = 256
_STOP_SECONDS = 3  # that answers under way have to end when the endpoint stops
_NAP_SECONDS = 3600.0  # a wait without an end could not be interrupted on Windows


@dataclass(frozen=True)
class EndpointSettings:
    host: str = "127.0.0.1"
    port: int = 8717  # 0: any free one
    rules: Rules = field(default_factory=Rules)


class Endpoint:
    """Serves from `start` to `stop`. `performer` does the work, in threads."""

    def __init__(self, performer: Performer, settings: EndpointSettings, token: str) -> None:
        self.token = token
        self._work = Work(performer, settings.rules.requests)
        guard = Guard(routes(self._work, settings.rules), settings.rules, token)
        self._socket = _bound(settings.host, settings.port)
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        self.url = f"http://{host}:{self._socket.getsockname()[1]}/v1"
        config = uvicorn.Config(
            guard,
            loop="asyncio",
            http=_Protocol,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            date_header=False,
            h11_max_incomplete_event_size=_HEAD_BYTES,
            limit_concurrency=_CONNECTIONS,
            timeout_keep_alive=int(_HEAD_SECONDS),
            timeout_graceful_shutdown=_STOP_SECONDS,
        )
        logging.getLogger("uvicorn.error").disabled = True  # a request's text may stand in what it logs
        self._server = uvicorn.Server(config)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="perfit-endpoint", daemon=True)

    def start(self) -> Endpoint:
        """It takes connections from here on."""
        self._socket.listen(128)
        self._thread.start()
        return self

    def _serve(self) -> None:
        """Outside of the main thread uvicorn leaves signals alone."""
        try:
            self._server.run(sockets=[self._socket])
        finally:
            self._stopped.set()

    def wait(self) -> None:
        """Until it stops. Raises KeyboardInterrupt when this thread's `Cancellation` is cancelled."""
        with waiting(self._stopped.set):
            while not self._stopped.wait(_NAP_SECONDS):
                pass

    def stop(self) -> None:
        """Answers under way break off."""
        self._server.should_exit = True
        self._work.close()
        self._thread.join(2 * _STOP_SECONDS)
        self._socket.close()

    def __enter__(self) -> Endpoint:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


class _Protocol(H11Protocol):
    """Closes connections that hold a place without sending a request."""

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._wait_for_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._is_idle():
            self._wait_for_head()

    def _is_idle(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _wait_for_head(self) -> None:
        if self._deadline is None:
            self._deadline = self.loop.call_later(_HEAD_SECONDS, self._close_idle)

    def _close_idle(self) -> None:
        self._deadline = None
        if self._is_idle() and not self.transport.is_closing():
            self.transport.close()


def _bound(host: str, port: int) -> socket.socket:
    """Raises ConfigError where nothing can be bound there."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigError(f'"{host}" is no address of this machine; leave --host out') from error
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise ConfigError(
            f"port {port} of {host} cannot be taken ({error.strerror}); --port 0 takes any free one"
        ) from error
    return bound
