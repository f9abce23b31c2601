"""What gRPC says by itself."""

from __future__ import annotations

import os
import subprocess
import sys

# A handshake with somebody who does not speak TLS.
PROGRAM = """
from perfit_shared.grpc_environment import prepare_grpc
prepare_grpc()
import socket, threading, grpc
listening = socket.create_server(("127.0.0.1", 0))
def answer():
    while True:
        listening.accept()[0].sendall(b"HTTP/1.1 400 this is not TLS")
threading.Thread(target=answer, daemon=True).start()
address = f"127.0.0.1:{listening.getsockname()[1]}"
channel = grpc.secure_channel(address, grpc.ssl_channel_credentials())
try:
    channel.unary_unary("/a/b")(b"", timeout=20)
except grpc.RpcError as error:
    print(error.code().name)
"""


def test_a_failed_handshake_is_told_once_and_by_us() -> None:
    unset = {name: value for name, value in os.environ.items() if name != "GRPC_VERBOSITY"}

    def said(**environment: str) -> tuple[str, str]:
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM],
            env=unset | environment,
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
        return done.stdout, done.stderr

    assert said() == ("UNAVAILABLE\n", "")
    assert "andshake" in said(GRPC_VERBOSITY="INFO")[1]  # what is set stays
