"""What gRPC reads from the environment as it is imported, set first; what is set already stays.

Nothing else is: with `-event_engine_client` in GRPC_EXPERIMENTS (grpcio 1.85.1) calls begun while a cloud
restarts stand still for minutes after it is back, or until something else happens on another channel.
"""

from __future__ import annotations

import os

__all__ = ["prepare_grpc"]


def prepare_grpc() -> None:
    """To be called before anything imports gRPC."""
    # Its own lines would stand where our one clear line belongs: any failed handshake is one.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
