"""Where a caller without a certificate calls from, as far as it can be told: what counts in its place."""

from __future__ import annotations

import ipaddress
import urllib.parse
from collections.abc import Iterable
from typing import Any

__all__ = ["forwarded_network", "network_of"]


def network_of(peer: str) -> str:
    """Of a peer of gRPC's: an IPv4 address, or the /64 of an IPv6 one."""
    kind, _, rest = urllib.parse.unquote(peer).partition(":")
    host = rest.rpartition(":")[0].strip("[]")
    return host if kind != "ipv6" else _network(ipaddress.IPv6Address(host))


def forwarded_network(metadata: Iterable[tuple[str, Any]], key: str) -> str | None:
    """The same of the address that a front put into a call's metadata `key`; None: it put none there.

    Whoever calls may have sent such metadata too. A front adds what it saw itself at the end, so the last
    address counts.
    """
    values = [str(value) for name, value in metadata if name == key]
    if not values:
        return None
    last = values[-1].rpartition(",")[2].strip()
    host, colon, port = last.rpartition(":")
    if colon and port.isdecimal() and (host.startswith("[") or ":" not in host):  # "[2001:db8::7]:50124"
        last = host
    try:
        return _network(ipaddress.ip_address(last.strip("[]")))
    except ValueError:
        return None


def _network(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> str:
    if isinstance(address, ipaddress.IPv4Address):
        return str(address)
    mapped = address.ipv4_mapped
    return str(mapped or ipaddress.IPv6Network((int(address) >> 64 << 64, 64)))
