"""What gRPC reads from the environment as it is imported, set first; what is set already stays.

Measured with grpcio 1.85.1 (`scripts/soak/load.py`, connections cut in between): its newer polling uses
freed memory, and the process dies. Seven servers of eight did so, after 1,600 to 9,400 calls, hardened or
not; the C library's heap check names gRPC's own threads. With the older polling one server died in some
45,000 calls: rarer by far, and not mended.
"""

from __future__ import annotations

import os

__all__ = ["prepare_grpc"]

_NEWER_POLLING = ("client", "listener", "callback_cq", "fork")


def prepare_grpc() -> None:
    """To be called before anything imports gRPC."""
    # Its own lines would stand where our one clear line belongs: any failed handshake is one.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    os.environ.setdefault("GRPC_EXPERIMENTS", ",".join(f"-event_engine_{part}" for part in _NEWER_POLLING))
