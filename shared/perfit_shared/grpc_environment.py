"""What gRPC reads from the environment as it is imported, set first; what is set already stays.

With the newer polling of grpcio 1.85.1 a process with 16 devices died once inside gRPC while connections
were cut (`scripts/soak/load.py`); with the older one none has.
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
