"""What stands in the environment when gRPC is imported."""

from __future__ import annotations

import os
import subprocess
import sys

PROGRAM = """
from perfit_shared.grpc_environment import prepare_grpc
prepare_grpc()
import os, grpc
channel = grpc.insecure_channel("127.0.0.1:1")
print(os.environ["GRPC_EXPERIMENTS"])
"""


def test_grpc_knows_every_part_that_is_turned_off() -> None:
    """It says so on stderr when it does not."""
    unset = {name: value for name, value in os.environ.items() if name != "GRPC_EXPERIMENTS"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=unset | {"GRPC_VERBOSITY": "ERROR"},
        capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    assert "-event_engine_listener" in done.stdout
    assert "Unknown experiment" not in done.stderr
    mine = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=unset | {"GRPC_EXPERIMENTS": "-no_such_thing"},
        capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    assert mine.stdout == "-no_such_thing\n"  # what is set stays
    assert "Unknown experiment" in mine.stderr
