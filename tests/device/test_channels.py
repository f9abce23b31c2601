"""Addresses, and what gRPC itself says, as a person reads it."""

from __future__ import annotations

import grpc
import pytest

from perfit_device.cloud.channels import address_of, translate
from perfit_shared.errors import Busy, NotAuthenticated


@pytest.mark.parametrize(
    ("address", "want"),
    [
        ("localhost:7443", ("localhost", 7443)),
        ("10.0.0.1:1", ("10.0.0.1", 1)),
        ("[::1]:65535", ("::1", 65535)),
        ("my_cloud-2.example.org:443", ("my_cloud-2.example.org", 443)),
    ],
)
def test_addresses(address: str, want: tuple[str, int]) -> None:
    assert address_of(address) == want


@pytest.mark.parametrize(
    "address",
    [
        "",
        "host",
        ":443",
        "host:",
        "host:0",
        "host:65536",
        "unix:///x:1",
        "host:²",
        "host:٤٤٣",
        "host:443\n",
        "\x1b[2Jhost:443",
        "ho\u202est:443",
        "höst:443",
        "ho st:443",
        "host%0:443",
        "a@b:443",
        "[]:443",
        "[:443",
        "[host]:443",
        "::1:443",
        "[[::1]]:443",
    ],
)
def test_addresses_that_cannot_be_dialled_or_steer_a_terminal(address: str) -> None:
    """Any host without a slash passed, escape sequences too, and ² as a port was a ValueError."""
    with pytest.raises(NotAuthenticated, match="host:port"):
        address_of(address)


class OfGrpc(grpc.RpcError, grpc.Call):  # type: ignore[misc]
    """A failure that gRPC made itself: no code of ours in the trailing metadata."""

    def __init__(self, status: grpc.StatusCode) -> None:
        self._status = status

    def code(self) -> grpc.StatusCode:
        return self._status

    def details(self) -> str:
        return "for programmers"

    def trailing_metadata(self) -> None:
        return None

    initial_metadata = is_active = time_remaining = cancel = add_callback = trailing_metadata


def test_grpc_s_own_exhaustion_may_be_a_busy_cloud() -> None:
    """It names one cause alone, though gRPC says the same of too many calls."""
    error = translate(OfGrpc(grpc.StatusCode.RESOURCE_EXHAUSTED), "host:1", b"")
    assert isinstance(error, Busy)
    assert "too busy" in str(error) and "larger than it takes" in str(error) and "try again" in str(error)
