"""Connections that come through a TCP load balancer, which says in front of each whose it is.

A balancer that passes TLS through hides the caller's address. With the PROXY protocol (version 2,
https://www.haproxy.org/download/1.8/doc/proxy-protocol.txt, sections 2.2 and 5) it sends 28 bytes for IPv4,
52 for IPv6, before the caller's first. gRPC cannot read them, and Python cannot hand it a connection that was
accepted elsewhere. So this listener accepts, reads the header, and passes the rest on to gRPC over
loopback. gRPC then names the port that we called from, and `peer_of` has the caller's address for it.

Only listed networks may connect: whoever may send a header can pretend to be any address. What passes
through is ciphertext; no key is here.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import socket
import struct
import threading
from collections.abc import Callable, Sequence
from typing import cast

from perfit_cloud.config import Network, parse_address
from perfit_shared.errors import ConfigError

__all__ = ["HEADER_MOST", "ProxiedListener", "read_header"]

_SIGNATURE = b"\r\n\r\n\x00\r\nQUIT\n"
_HEAD = struct.Struct("!12sBBH")  # signature, version and command, family and protocol, length of the rest
_LOCAL, _PROXY = 0x20, 0x21
# Family and protocol → (gRPC's word for it, bytes of one address). Others name no caller.
_FAMILIES = {0x11: ("ipv4", 4), 0x21: ("ipv6", 16)}
HEADER_MOST = 536  # bytes; what follows the addresses (TLVs) is skipped
_HIGH_WATER = 256 * 1024  # bytes that one direction of a connection may hold
_STALLED_SECONDS = 100.0  # that a side may take nothing; gRPC gives up a connection after 80
_LAST_SECONDS = 5.0  # for what one side still holds to be read, after the other is gone


def read_header(data: bytes) -> tuple[int, str | None] | None:
    """(bytes of the header, caller) once it is whole, else None.

    The caller as gRPC writes one, "ipv4:192.0.2.7:50124" or "ipv6:[2001:db8::7]:50124"; None where the
    balancer speaks for itself, as in its health checks. Raises ValueError on what is no such header.
    """
    if not _SIGNATURE.startswith(data[: len(_SIGNATURE)]):
        raise ValueError("no PROXY protocol, version 2")
    if len(data) < _HEAD.size:
        return None
    _, command, family, length = _HEAD.unpack_from(data)
    whole = _HEAD.size + length
    if command not in (_LOCAL, _PROXY) or whole > HEADER_MOST:
        raise ValueError("a command or a length that is not known")
    kind, size = _FAMILIES.get(family, ("", 0))
    if command == _PROXY and (not size or 2 * size + 4 > length):
        raise ValueError("a family that names no caller")
    if len(data) < whole:
        return None
    if command == _LOCAL:
        return whole, None
    address = ipaddress.ip_address(data[_HEAD.size : _HEAD.size + size])
    (port,) = struct.unpack_from("!H", data, _HEAD.size + 2 * size)
    return whole, f"ipv4:{address}:{port}" if kind == "ipv4" else f"ipv6:[{address}]:{port}"


class ProxiedListener:
    """Accepts for one gRPC server, in a thread of its own."""

    def __init__(
        self, address: str, trusted: Sequence[Network], *, connections: int, header_seconds: float
    ) -> None:
        """Binds the port; `connections`: at once. Raises ConfigError when it is taken."""
        host, port = parse_address(address)
        self._trusted, self._connections, self._header_seconds = trusted, connections, header_seconds
        try:
            self._socket = socket.create_server((host, port), family=_family(host), backlog=1024)
        except OSError:
            raise ConfigError(
                f"cannot listen on {address}; is the port taken, or the host not ours?"
            ) from None
        self._socket.setblocking(False)
        self.port: int = self._socket.getsockname()[1]
        self._target = 0
        self._callers: dict[int, str] = {}  # the port that we call gRPC from → the caller
        self._open: set[_Side] = set()
        self._accepted = 0  # of these, connections from outside
        self._loop = asyncio.new_event_loop()
        self._server: asyncio.Server | None = None
        self._thread = threading.Thread(target=self._run, name="perfit-proxied", daemon=True)

    def start(self, target: int) -> None:
        """Pass on what comes to gRPC's port `target` of this host."""
        self._target = target
        self._thread.start()

    def peer_of(self, peer: str) -> str:
        """Who is behind a peer of gRPC's, in the same form."""
        return self._callers.get(int(peer.rpartition(":")[2] or 0), peer)

    def refuse(self) -> None:
        """Take no more connections; the open ones go on. From any thread."""
        self._call(self._refuse)

    def close(self) -> None:
        """Cut off what is open."""
        if self._thread.is_alive():
            self._call(self._loop.stop)
            self._thread.join()
        self._socket.close()

    # -- in the loop's thread ------------------------------------------------------------------

    def _call(self, what: Callable[[], None]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is over
            self._loop.call_soon_threadsafe(what)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        accepted = self._loop.create_server(lambda: _Caller(self), sock=self._socket)
        self._server = self._loop.run_until_complete(accepted)
        self._loop.run_forever()
        self._refuse()
        for side in list(self._open):
            side.transport.abort()
        self._loop.run_until_complete(asyncio.sleep(0))
        self._loop.close()

    def _refuse(self) -> None:
        if self._server is not None:
            self._server.close()

    def _admits(self, address: str) -> bool:
        host = ipaddress.ip_address(address.partition("%")[0])
        host = getattr(host, "ipv4_mapped", None) or host
        return self._accepted <= self._connections and any(host in network for network in self._trusted)

    async def _connected(self, caller: _Caller, peer: str) -> None:
        """A connection to gRPC for this caller, entered before gRPC can ask whose it is."""
        mine, port = None, 0
        try:
            mine = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
            mine.setblocking(False)
            mine.bind(("127.0.0.1", 0))
            port = mine.getsockname()[1]
            self._callers[port] = peer
            await self._loop.sock_connect(mine, ("127.0.0.1", self._target))
            await self._loop.create_connection(lambda: _Server(self, caller, port), sock=mine)
        except OSError:  # also where there is no descriptor, or no port, for it
            self._callers.pop(port, None)
            if mine is not None:
                mine.close()
            caller.transport.abort()


class _Side(asyncio.Protocol):
    """One of the two connections; what comes in on it goes out on the other."""

    def __init__(self, listener: ProxiedListener) -> None:
        self.listener = listener
        self.other: _Side | None = None
        self.transport: asyncio.Transport
        self._stalled: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        self.transport.set_write_buffer_limits(high=_HIGH_WATER)
        # Small frames wait for nothing, or a call takes 40 ms more.
        self.transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.listener._open.add(self)

    def data_received(self, data: bytes) -> None:
        if self.other is not None:
            self.other.transport.write(data)

    def eof_received(self) -> bool:
        if self.other is not None and self.other.transport.can_write_eof():
            self.other.transport.write_eof()
        return self.other is not None  # the other direction goes on

    def pause_writing(self) -> None:
        """The other side sends faster than this one takes. While it is not read, its end is not seen."""
        self._stalled = self.listener._loop.call_later(_STALLED_SECONDS, self.transport.abort)
        if self.other is not None:
            self.other.transport.pause_reading()

    def resume_writing(self) -> None:
        self._end_stall()
        if self.other is not None:
            self.other.transport.resume_reading()

    def _end_stall(self) -> None:
        if self._stalled is not None:
            self._stalled.cancel()

    def connection_lost(self, error: Exception | None) -> None:
        self._end_stall()
        self.listener._open.discard(self)
        if self.other is not None and not self.other.transport.is_closing():
            self.other.transport.close()  # sends what it still holds, if anybody reads that
            self.listener._loop.call_later(_LAST_SECONDS, self.other.transport.abort)


class _Caller(_Side):
    """A connection from outside: a header, then what is passed on."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.listener._accepted += 1
        self._start = b""
        self._task: asyncio.Task[None] | None = None
        self._address: str = transport.get_extra_info("peername")[0]
        self._port: int = transport.get_extra_info("peername")[1]
        self._late = self.listener._loop.call_later(self.listener._header_seconds, self.transport.abort)
        if not self.listener._admits(self._address):
            self.transport.abort()

    def data_received(self, data: bytes) -> None:
        if self.other is not None:
            super().data_received(data)
            return
        self._start += data
        if self._task is not None:
            return
        try:
            found = read_header(self._start)
        except ValueError:
            self.transport.abort()
            return
        if found is not None:
            self._late.cancel()
            size, peer = found
            self._start = self._start[size:]
            self.transport.pause_reading()  # until there is somewhere to pass it on to
            kind, own = ("ipv6", f"[{self._address}]") if ":" in self._address else ("ipv4", self._address)
            connected = self.listener._connected(self, peer or f"{kind}:{own}:{self._port}")
            self._task = self.listener._loop.create_task(connected)

    def joined(self, other: _Side) -> None:
        self.other = other
        other.transport.write(self._start)
        self._start = b""
        self.transport.resume_reading()

    def connection_lost(self, error: Exception | None) -> None:
        self._late.cancel()
        self.listener._accepted -= 1
        super().connection_lost(error)


class _Server(_Side):
    """Our connection to gRPC."""

    def __init__(self, listener: ProxiedListener, caller: _Caller, port: int) -> None:
        super().__init__(listener)
        self._caller, self._port = caller, port

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.other = self._caller
        if self._caller.transport.is_closing():
            self.transport.abort()
        else:
            self._caller.joined(self)

    def eof_received(self) -> bool:
        return False  # gRPC closes both directions at once

    def connection_lost(self, error: Exception | None) -> None:
        self.listener._callers.pop(self._port, None)
        super().connection_lost(error)


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET
