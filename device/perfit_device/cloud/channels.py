"""gRPC channels to a cloud, and its errors as ours. Never fork after a channel exists.

gRPC itself repeats only calls that a cloud never saw. Its own retry policy would ignore the cloud's retry
delay, so `RetryPolicy` does the rest.
"""

from __future__ import annotations

import random
import re
import socket
import ssl
from datetime import UTC, datetime
from typing import Any

import grpc

from perfit_device.cloud.identity import Enrolment, pem
from perfit_shared.errors import BrokenOff, NotAuthenticated, PerfitError, Unavailable, from_code

__all__ = [
    "MESSAGE_BYTES",
    "address_of",
    "addresses_of",
    "enrolment_channel",
    "mutual_channel",
    "readable",
    "shuffled",
    "translate",
]

MESSAGE_BYTES = 32 * 1024 * 1024  # largest message in either direction
_MESSAGE_CHARACTERS = 500  # what is shown of a cloud's error message
_PROBE_SECONDS = 3.0
_MOST_ADDRESSES = 16
_SHUFFLED = '{"loadBalancingConfig": [{"pick_first": {"shuffleAddressList": true}}]}'
# OpenSSL's X509_V_ERR_CERT_NOT_YET_VALID and X509_V_ERR_CERT_HAS_EXPIRED
_NOT_THE_TIME = (9, 10)
# A cloud sends its own address, and terminals show it, so it must not hold control characters.
_ADDRESS = re.compile(r"(?:\[([0-9A-Fa-f.:]+)\]|([A-Za-z0-9.\-_]+)):([0-9]{1,5})")


def address_of(address: str) -> tuple[str, int]:
    """(host, port). Raises NotAuthenticated on an address that cannot be dialled."""
    match = _ADDRESS.fullmatch(address)
    if match is None or not 0 < int(match[3]) < 65536:
        raise NotAuthenticated("the cloud's address should read host:port; enrol again with a new invite")
    return match[1] or match[2], int(match[3])


def addresses_of(text: str) -> list[str]:
    """Every "host:port" of a text that may have several, with commas. Raises NotAuthenticated."""
    addresses = [each.strip() for each in text.split(",")]
    if len(addresses) > _MOST_ADDRESSES:
        raise NotAuthenticated(f"the cloud has more than {_MOST_ADDRESSES} addresses; tell its operator")
    for each in addresses:
        address_of(each)
    return addresses


def shuffled(text: str) -> list[str]:
    """The same in an order of chance: devices spread themselves. Raises NotAuthenticated."""
    addresses = addresses_of(text)
    return random.sample(addresses, len(addresses))


def enrolment_channel(address: str, roots: bytes) -> grpc.Channel:
    """Server TLS with `roots` (PEM) alone."""
    return _channel(address, grpc.ssl_channel_credentials(root_certificates=roots))


def mutual_channel(enrolment: Enrolment, address: str, front_roots: bytes = b"") -> grpc.Channel:
    """Mutual TLS with the device's certificate, to one of the cloud's addresses.

    `front_roots` (PEM) are trusted beside the cloud's own CA.
    """
    return _channel(
        address,
        grpc.ssl_channel_credentials(
            root_certificates=enrolment.roots + front_roots,
            private_key=enrolment.identity.to_pem(),
            certificate_chain=pem(enrolment.certificate),
        ),
    )


def _channel(address: str, credentials: grpc.ChannelCredentials) -> grpc.Channel:
    host, _ = address_of(address)
    options: list[tuple[str, int | str]] = [
        ("grpc.max_send_message_length", MESSAGE_BYTES),
        ("grpc.max_receive_message_length", MESSAGE_BYTES),
        # Reconnect within seconds after a restart; gRPC would wait up to two minutes.
        ("grpc.initial_reconnect_backoff_ms", 250),
        ("grpc.max_reconnect_backoff_ms", 3000),
        # Give up on a host that says nothing sooner than after 20 s: another may answer.
        ("grpc.min_reconnect_backoff_ms", 5000),
        # A name may stand for several hosts: devices spread over them, where all would take the first.
        ("grpc.service_config", _SHUFFLED),
        ("grpc.use_local_subchannel_pool", 1),  # a new channel connects anew, perhaps to another replica
        # Notice a lost network under a waiting call, however long its deadline.
        ("grpc.keepalive_time_ms", 60_000),
        ("grpc.keepalive_timeout_ms", 20_000),
        ("grpc.http2.max_pings_without_data", 0),  # no limit; the default stops after two pings
    ]
    if host in ("localhost", "127.0.0.1", "::1"):
        options.append(("grpc.enable_http_proxy", 0))
    return grpc.secure_channel(address, credentials, options=options)


def translate(error: grpc.RpcError, address: str, roots: bytes) -> PerfitError:
    """One RPC's failure as an exception of the shared tree; `roots` (PEM) tell who answers there."""
    call = error if isinstance(error, grpc.Call) else None
    status = call.code() if call else grpc.StatusCode.UNKNOWN
    trailing: dict[str, str] = {}
    metadata: Any = call.trailing_metadata() if call else None
    for key, value in metadata or ():
        trailing[str(key)] = str(value)
    code, delay = trailing.get("perfit-code"), trailing.get("perfit-retry-ms", "0")
    if code is not None:
        message = readable(str(call.details() if call else ""))
        return from_code(
            status.name, code, message, int(delay) if delay.isdecimal() and len(delay) < 9 else 0
        )
    # gRPC made this status itself, so its text is for programmers.
    return _transport_error(status, address, roots)


def _transport_error(status: grpc.StatusCode, address: str, roots: bytes) -> PerfitError:
    messages = {
        grpc.StatusCode.DEADLINE_EXCEEDED: f"the cloud at {address} took too long; try again later",
        grpc.StatusCode.RESOURCE_EXHAUSTED: (
            f"the cloud at {address} is too busy, or the message is larger than it takes; try again"
        ),
        grpc.StatusCode.CANCELLED: "the call was cancelled",
        grpc.StatusCode.UNIMPLEMENTED: f"the cloud at {address} is of another version; update perfit",
        grpc.StatusCode.UNAUTHENTICATED: f"the cloud at {address} does not know this device; enrol again",
        grpc.StatusCode.INTERNAL: f"the cloud at {address} failed; try again, or tell its operator",
    }
    if status is grpc.StatusCode.UNAVAILABLE:
        return _why_unreachable(address, roots)
    message = messages.get(status, f"the cloud at {address} failed ({status.name}); tell its operator")
    return from_code(status.name, None, message)


def _why_unreachable(address: str, roots: bytes) -> PerfitError:
    """Probe the address: gRPC distinguishes an absent server from an untrusted one only in free text."""
    context = ssl.create_default_context(cadata=roots.decode("ascii"))
    host, port = address_of(address)
    gone = Unavailable(f"cannot reach the cloud at {address}; is it running, and is the network up?")
    try:
        with socket.create_connection((host, port), timeout=_PROBE_SECONDS) as plain:
            context.wrap_socket(plain, server_hostname=host).close()
    except ssl.SSLCertVerificationError as error:
        if error.verify_code in _NOT_THE_TIME:
            return NotAuthenticated(
                f"by this device's clock, {datetime.now(UTC):%Y-%m-%d %H:%M} UTC, the certificate of the "
                f"server at {address} is not valid; set the clock, or tell the cloud's operator"
            )
        return NotAuthenticated(
            f"the server at {address} is not the cloud that this device trusts: its certificate comes "
            "from someone else; check the address, or ask the operator for a new invite"
        )
    except OSError:  # covers timeouts and ssl.SSLError
        return gone
    return BrokenOff(f"the cloud at {address} broke off the call; try again, and if it stays so, enrol again")


def readable(text: str) -> str:
    """A cloud's message, harmless on a terminal."""
    return (
        "".join(c if c.isprintable() else " " for c in text)[:_MESSAGE_CHARACTERS].strip()
        or "the cloud gave no reason"
    )
