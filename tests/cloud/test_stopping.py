"""A server process that is told to stop ends, whatever its threads do."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
from tests.support.authority import csr_of, new_key, open_authority
from tests.support.cloud import key_pem, pem
from tests.support.processes import Forked, fork

from perfit_shared.wire import personalization_pb2 as pb
from perfit_shared.wire import personalization_pb2_grpc as pb_grpc

LONG = 300.0  # seconds that what is stuck takes; a test that waits for it fails
ENDS = 45.0  # seconds, with a drain of one, on a busy machine

# Programs whose server has a thread that does not end: of a call, and of an engine.
STUCK_CALL = f"""
import time
from perfit_cloud.service.servicers import PersonalizationService
def stuck(self, request, context):
    print("stuck", flush=True)
    time.sleep({LONG})
PersonalizationService.Describe = stuck
"""
STUCK_ENGINE = f"""
import time
from perfit_cloud.engine.gradients.scheduler import GradientScheduler
def stuck(self):
    print("stuck", flush=True)
    time.sleep({LONG})
GradientScheduler.close = stuck
"""


@contextmanager
def serving(program: str, state: Path, model: Path, drain: int) -> Iterator[tuple[Forked, str]]:
    """The process, and where it serves devices."""
    words = ["serve", "--model", str(model), "--state", str(state), "--json", "--threads", "1"]
    words += ["--address", "127.0.0.1:0", "--enrol-address", "127.0.0.1:0", "--set", f"drain_seconds={drain}"]
    process = fork(*words, before=program, errors=state.with_suffix(".log"))
    try:
        yield process, json.loads(process.stdout.readline())["address"]
    finally:
        process.kill()


def enrolled(state: Path) -> grpc.ChannelCredentials:
    """A device that the server knows from its start."""
    authority, key = open_authority(state), new_key()
    certificate = authority.enroll(authority.invite(60)[0], csr_of(key))
    authority.close()
    return grpc.ssl_channel_credentials(pem(authority.server_ca_der), key_pem(key), pem(certificate))


@contextmanager
def calling(credentials: grpc.ChannelCredentials, address: str) -> Iterator[grpc.Future]:
    with grpc.secure_channel(address, credentials, options=[("grpc.enable_http_proxy", 0)]) as channel:
        yield pb_grpc.PersonalizationStub(channel).Describe.future(pb.DescribeRequest(), timeout=LONG)


def stuck(process: Forked) -> None:
    """Wait until it is."""
    assert process.stdout.readline() == "stuck\n"


@pytest.mark.parametrize(("drain", "signals"), [(1, 1), (int(LONG), 2)])
def test_a_call_that_does_not_end_is_cut_off(
    tmp_path: Path, model_folder: Callable[[str], Path], drain: int, signals: int
) -> None:
    """Python waits for every thread of a pool before it ends: SIGTERM took as long as the call."""
    state = tmp_path / "state"
    credentials = enrolled(state)
    with (
        serving(STUCK_CALL, state, model_folder("llama"), drain) as (process, address),
        calling(credentials, address) as call,
    ):
        stuck(process)
        process.send_signal(signal.SIGTERM)
        if signals > 1:
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(1)
            process.send_signal(signal.SIGTERM)
        assert process.wait(ENDS) == 0
        assert call.exception() is not None
        assert "cut off" in process.errors()


@pytest.mark.slow
def test_an_engine_that_does_not_end_is_cut_off(tmp_path: Path, model_folder: Callable[[str], Path]) -> None:
    with serving(STUCK_ENGINE, tmp_path / "state", model_folder("llama"), 1) as (process, _):
        process.send_signal(signal.SIGTERM)
        stuck(process)
        assert process.wait(ENDS) == 0


@pytest.mark.slow
def test_a_thread_that_never_lets_python_go_on_is_ended_by_the_system(
    tmp_path: Path, model_folder: Callable[[str], Path]
) -> None:
    program = f"""
import ctypes
from perfit_cloud.cli import shutdown
from perfit_cloud.engine.gradients.scheduler import GradientScheduler
shutdown._LAST_SECONDS = 2
GradientScheduler.close = lambda self: ctypes.PyDLL(None).sleep({int(LONG)})
"""
    with serving(program, tmp_path / "state", model_folder("llama"), 1) as (process, _):
        process.send_signal(signal.SIGTERM)
        assert process.wait(ENDS) == -signal.SIGALRM
