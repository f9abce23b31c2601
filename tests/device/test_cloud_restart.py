"""A cloud that goes away and comes back, in a process of its own: what gRPC makes of that, over TLS."""

from __future__ import annotations

import datetime
import ipaddress
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from perfit_device.cloud.channels import enrolment_channel, translate
from perfit_device.cloud.identity import pem
from perfit_device.cloud.retry import RetryPolicy

SERVER = """
import sys, grpc
from concurrent.futures import ThreadPoolExecutor
answers = {"Answer": grpc.unary_stream_rpc_method_handler(lambda request, context: iter([request] * 3))}
server = grpc.server(ThreadPoolExecutor(4), [grpc.method_handlers_generic_handler("test.Cloud", answers)])
key, certificate = (open(name, "rb").read() for name in sys.argv[2:])
server.add_secure_port(sys.argv[1], grpc.ssl_server_credentials([(key, certificate)]))
server.start()
print("up", flush=True)
server.wait_for_termination()
"""


@pytest.fixture
def certificate(tmp_path: Path) -> bytes:
    """DER, for 127.0.0.1; its files lie in tmp_path."""
    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([])
    now = datetime.datetime.now(datetime.UTC)
    address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now)
        .not_valid_after(now + datetime.timedelta(1))
        .add_extension(address, critical=True)
        .sign(key, hashes.SHA256())
    )
    (tmp_path / "certificate").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    (tmp_path / "key").write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    return made.public_bytes(serialization.Encoding.DER)


@pytest.fixture
def address() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


@pytest.fixture
def start(tmp_path: Path, address: str) -> Iterator[Callable[[], subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []

    def start() -> subprocess.Popen[str]:
        command = [
            sys.executable,
            "-c",
            SERVER,
            address,
            str(tmp_path / "key"),
            str(tmp_path / "certificate"),
        ]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout and process.stdout.readline() == "up\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.slow
def test_a_call_begun_while_the_cloud_restarts_is_answered_soon_after_it_is_back(
    certificate: bytes, address: str, start: Callable[[], subprocess.Popen[str]]
) -> None:
    """With another of gRPC's ways to wait for sockets it stood still for half a minute and more."""
    cloud = start()
    answered = threading.Event()
    roots = pem(certificate)
    with enrolment_channel(address, roots) as channel:
        method = channel.unary_stream("/test.Cloud/Answer")

        def ask() -> list[bytes]:
            try:
                return list(method(b"question", timeout=120))
            except grpc.RpcError as error:
                raise translate(error, address, roots) from error

        def patiently() -> None:
            assert RetryPolicy(give_up=60, longest_wait=1).call(ask) == [b"question"] * 3
            answered.set()

        assert ask() == [b"question"] * 3
        cloud.kill()
        cloud.wait()
        asking = threading.Thread(target=patiently)
        asking.start()
        time.sleep(2.5)
        assert not answered.is_set()
        start()
        assert answered.wait(10)
        asking.join()
