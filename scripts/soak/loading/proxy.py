"""A TCP proxy between devices and a cloud, which cuts connections or lets nothing through for a while."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Coroutine
from typing import Any

__all__ = ["Proxy"]

_CHUNK = 1 << 16  # bytes


class Proxy:
    """Listens on a free port of loopback from the start; all its work is in a thread of its own."""

    def __init__(self, upstream_port: int) -> None:
        """`upstream_port` on loopback; nobody need listen there yet, or all the time."""
        self._upstream_port = upstream_port
        self._loop = asyncio.new_event_loop()
        self._connections: set[asyncio.StreamWriter] = set()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._thread.start()
        self.port: int = self._do(self._listen())

    def cut(self) -> int:
        """Reset every connection; how many there were."""
        return int(self._do(self._cut()))

    def stall(self, seconds: float) -> None:
        """Let no byte through for so long, with all connections open."""
        self._do(self._stall(seconds))

    def close(self) -> None:
        self._do(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _do(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(60)

    # -- in the proxy's thread ---------------------------------------------------------------------------

    async def _listen(self) -> int:
        self._flows = asyncio.Event()
        self._flows.set()
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return int(self._server.sockets[0].getsockname()[1])

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._connections.add(writer)
        try:
            beyond, to_beyond = await asyncio.open_connection("127.0.0.1", self._upstream_port)
        except OSError:  # no cloud there just now
            self._drop(writer)
            return
        self._connections.add(to_beyond)
        try:
            await asyncio.gather(self._pump(reader, to_beyond), self._pump(beyond, writer))
        finally:
            self._drop(writer)
            self._drop(to_beyond)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(_CHUNK):
                await self._flows.wait()
                writer.write(data)
                await writer.drain()
        # Half-closed is closed, as between most networks.
        self._drop(writer)

    def _drop(self, writer: asyncio.StreamWriter) -> None:
        self._connections.discard(writer)
        writer.transport.abort()

    async def _cut(self) -> int:
        cut = list(self._connections)
        for writer in cut:
            self._drop(writer)
        return len(cut) // 2

    async def _stall(self, seconds: float) -> None:
        self._flows.clear()
        await asyncio.sleep(seconds)
        self._flows.set()

    async def _close(self) -> None:
        self._server.close()
        await self._cut()
