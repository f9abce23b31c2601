"""Frames of HTTP/2, to do what no gRPC client does."""

from __future__ import annotations

import socket
import ssl

from tests.support.cloud import TIMEOUT, Device, Running, key_pem, pem

# Frames of HTTP/2, to do what no gRPC client lets one do.
DATA, HEADERS, SETTINGS, PING, END_STREAM, END_HEADERS = 0x0, 0x1, 0x4, 0x6, 0x1, 0x4


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload


def headers(stream: int, path: str, *more: tuple[str, str]) -> bytes:
    """The frame that begins a call."""
    fields = [
        (":method", "POST"),
        (":scheme", "https"),
        (":path", path),
        (":authority", "localhost"),
        ("content-type", "application/grpc"),
        ("te", "trailers"),
        *more,
    ]
    # Literal header fields without indexing, RFC 7541 6.2.2.
    block = b"".join(
        b"\0" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode()
        for name, value in fields
    )
    return frame(HEADERS, END_HEADERS, stream, block)


def connect(running: Running, address: str, device: Device | None, settings: bytes = b"") -> ssl.SSLSocket:
    """A connection that speaks HTTP/2, with no gRPC on our side of it."""
    context = ssl.create_default_context(cadata=pem(running.authority.server_ca_der).decode())
    context.set_alpn_protocols(["h2"])
    if device is not None:
        file = running.config.state / "device.pem"
        file.write_bytes(key_pem(device.key) + pem(device.certificate))
        context.load_cert_chain(file)
    host, port = address.rsplit(":", 1)
    tls = context.wrap_socket(socket.create_connection((host, int(port)), TIMEOUT), server_hostname=host)
    tls.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(SETTINGS, 0, 0, settings))
    return tls


def header_only_calls(
    running: Running, address: str, path: str, count: int, device: Device | None
) -> ssl.SSLSocket:
    """A connection on which `count` calls were begun that never send their message, nor any deadline."""
    tls = connect(running, address, device)
    tls.sendall(b"".join(headers(2 * i + 1, path) for i in range(count)))
    return tls
