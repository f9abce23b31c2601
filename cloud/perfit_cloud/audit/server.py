"""A server to be audited, as a process of its own, and devices that talk to it over mutual TLS."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from perfit_cloud.config import parse_address
from perfit_shared.errors import ConfigError, PerfitError
from perfit_shared.invites import Invite
from perfit_shared.wire import enrollment_pb2 as enrol_pb
from perfit_shared.wire import enrollment_pb2_grpc as enrol_grpc
from perfit_shared.wire import personalization_pb2_grpc as pb_grpc

__all__ = ["AuditedServer", "Connection", "DeviceKey", "Relay", "Sealed", "signature_of"]

_SECONDS = 30.0  # deadline of an enrolment, and of the server's end
_INVITES = 3  # made at once, at least: the command takes seconds
_HOST = "127.0.0.1"
_ANY_PORT = f"{_HOST}:0"
_NOW = struct.pack("ii", 1, 0)  # SO_LINGER: a socket that is closed is reset, and what waits is dropped
# A relay and a server on one machine; a proxy of the environment has no business here.
_OPTIONS = [("grpc.enable_http_proxy", 0), ("grpc.use_local_subchannel_pool", 1)]


class DeviceKey:
    """A device's key, and its certificate once it is enrolled."""

    def __init__(self) -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.certificate = b""

    @property
    def secret(self) -> bytes:
        """The private number, which never leaves a device: 32 bytes."""
        return self.key.private_numbers().private_value.to_bytes(32, "big")

    def csr(self) -> bytes:
        builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
        return builder.sign(self.key, hashes.SHA256()).public_bytes(serialization.Encoding.DER)

    def credentials(self, server_ca: bytes) -> grpc.ChannelCredentials:
        key = self.key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        return grpc.ssl_channel_credentials(_pem(server_ca), key, _pem(self.certificate))


# A channel whose calls are sealed, over this one, for a device of the cloud with this server CA (DER).
Sealed = Callable[[grpc.Channel, DeviceKey, bytes], grpc.Channel]


class AuditedServer:
    """`perfit-cloud serve` for the length of a with block, its folders all below `folder`."""

    def __init__(
        self,
        folder: Path,
        *,
        model: str,
        artefact: Path,
        hardening: str,
        flags: Sequence[str] = (),
        sealed: Sealed | None = None,
        database: str = "",
    ) -> None:
        """`sealed`: devices call where sealed calls alone are taken, over what it makes of their channels.
        `database`: an empty PostgreSQL; a process beside this one enrols, and this is a replica of a fleet.
        """
        self.folder, self._state, self._sealed = folder, folder / "state", sealed
        self.enrols = not database
        self._unused: list[Invite] = []
        command = Path(sys.executable).with_name("perfit-cloud")
        if not command.exists():
            raise ConfigError(f"no perfit-cloud beside {sys.executable}; run the one of a whole installation")
        self._command = str(command)
        self._work = folder / "work"
        self._environment = {**os.environ, "TMPDIR": str(self._work)}
        if database:
            self._environment["PERFIT_CLOUD_DATABASE"] = database
        self._shared = ["serve", "--json", "--set", f"hardening={hardening}"]
        self._serving = [
            "--model",
            str(Path(model).resolve() if Path(model).exists() else model),
            "--artefact",
            str(artefact.resolve()),
            "--address",
            _ANY_PORT,
            *(["--front-address", _ANY_PORT] if sealed else []),
            *flags,
        ]
        self._running = contextlib.ExitStack()

    def __enter__(self) -> Self:
        """Raises PerfitError with what a process said when it does not start."""
        self._work.mkdir(parents=True)
        enrolling = ["--state", str(self._state), "--enrol-address", _ANY_PORT]
        with contextlib.ExitStack() as running:
            if self.enrols:
                self._process, self.said = self._start("server", enrolling + self._serving, running)
            else:
                # Whoever enrols is told that devices dial nowhere; they dial what the replica says.
                enrolling += ["--roles", "enrolment", "--public-address", f"{_HOST}:1"]
                _, said = self._start("enrolment", enrolling, running)
                state = str(self.folder / "replica")
                self._run("server", _HOST, "--out", state)
                replica = ["--roles", "answers,updates", "--state", state]
                replica += ["--set", f"authority_address={said['enrol_address']}"]
                self._process, self.said = self._start("server", replica + self._serving, running)
            self._running = running.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._running.close()

    def _start(
        self, name: str, arguments: Sequence[str], running: contextlib.ExitStack
    ) -> tuple[subprocess.Popen[str], dict[str, Any]]:
        """A process that `running` ends, and its start-up line."""
        log = self.folder / f"{name}.log"
        with log.open("wb") as errors:
            process = subprocess.Popen(
                [self._command, *self._shared, *arguments],
                cwd=self._work,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        running.callback(_stop, process)
        line = process.stdout.readline() if process.stdout else ""
        if not line.strip():
            process.wait(_SECONDS)
            raise PerfitError(f"the {name} did not start: {log.read_text('utf-8').strip()[-500:]}")
        return process, json.loads(line)

    def _run(self, *arguments: str) -> str:
        """What a command says about the state of whoever enrols."""
        done = subprocess.run(
            [self._command, *arguments, "--state", str(self._state)],
            env=self._environment,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise PerfitError(f"perfit-cloud {arguments[0]} failed: {done.stderr.strip()[-500:]}")
        return done.stdout

    @property
    def pid(self) -> int:
        return self._process.pid

    def invites(self, count: int) -> list[Invite]:
        if len(self._unused) < count:
            made = self._run("invite", "--count", str(max(count, _INVITES)))
            self._unused += [Invite.decode(line) for line in made.split()]
        given, self._unused = self._unused[:count], self._unused[count:]
        return given

    def enrolment(self, invite: Invite) -> Connection:
        roots = grpc.ssl_channel_credentials(_pem(invite.server_ca_der))
        return Connection(grpc.secure_channel(invite.address, roots, options=_OPTIONS))

    def enrol(self, count: int) -> list[DeviceKey]:
        """As many new devices."""
        devices = []
        for invite in self.invites(count):
            device = DeviceKey()
            with self.enrolment(invite) as connection:
                request = enrol_pb.EnrollRequest(secret=invite.secret, csr=device.csr())
                given = connection.enrollment.Enroll(request, timeout=_SECONDS)
            device.certificate, self._server_ca = given.certificate, given.server_ca
            devices.append(device)
        return devices

    def connect(self, device: DeviceKey) -> Connection:
        """A channel of the device's own, through a relay that can cut it."""
        relay = Relay(parse_address(self.said["front_address" if self._sealed else "address"]))
        credentials = device.credentials(self._server_ca)
        channel = grpc.secure_channel(f"127.0.0.1:{relay.port}", credentials, options=_OPTIONS)
        if self._sealed is not None:
            channel = self._sealed(channel, device, self._server_ca)
        return Connection(channel, relay)


@dataclass(frozen=True)
class Connection:
    """A channel, closed at the end of a with block."""

    channel: grpc.Channel
    relay: Relay | None = None

    @property
    def enrollment(self) -> Any:
        return enrol_grpc.EnrollmentStub(self.channel)

    @property
    def identity(self) -> Any:
        return enrol_grpc.IdentityStub(self.channel)

    @property
    def personalization(self) -> Any:
        return pb_grpc.PersonalizationStub(self.channel)

    def close(self) -> None:
        self.channel.close()
        if self.relay is not None:
            self.relay.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Relay:
    """Passes bytes between a client on a port of loopback and a server, until it is cut.

    To the server a cut looks like a client whose process or network has died.
    """

    def __init__(self, server: tuple[str, int]) -> None:
        self._server = server
        self._lock = threading.Lock()
        self._sockets: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, name="audit-relay", daemon=True).start()

    def cut(self) -> None:
        """Reset every connection, and take no new ones."""
        self.close()
        with self._lock:
            for end in self._sockets:
                with contextlib.suppress(OSError):
                    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NOW)
                    end.shutdown(socket.SHUT_RD)  # wakes the thread that reads
                end.close()

    def close(self) -> None:
        """Take no new connections; those that are there end with their client's."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # the listener was closed
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(self._server)
                with self._lock:
                    self._sockets += [client, server]
                for ends in ((client, server), (server, client)):
                    threading.Thread(target=_pump, args=ends, name="audit-relay", daemon=True).start()


def _pump(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(2**16):
            sink.sendall(data)
    with contextlib.suppress(OSError):
        sink.shutdown(socket.SHUT_WR)


def _stop(process: subprocess.Popen[str]) -> None:
    process.terminate()
    try:
        process.wait(_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(_SECONDS)
    if process.stdout:
        process.stdout.close()


def signature_of(csr: bytes) -> bytes:
    """What is random in a signing request and in no certificate."""
    return x509.load_der_x509_csr(csr).signature


def _pem(der: bytes) -> bytes:
    return x509.load_der_x509_certificate(der).public_bytes(serialization.Encoding.PEM)
