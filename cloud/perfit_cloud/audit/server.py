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
    ) -> None:
        """`sealed`: devices call where sealed calls alone are taken, over what it makes of their channels."""
        self.folder, self._state, self._sealed = folder, folder / "state", sealed
        self._unused: list[Invite] = []
        command = Path(sys.executable).with_name("perfit-cloud")
        if not command.exists():
            raise ConfigError(f"no perfit-cloud beside {sys.executable}; run the one of a whole installation")
        self._command = str(command)
        self._arguments = [
            "serve",
            "--json",
            "--model",
            str(Path(model).resolve() if Path(model).exists() else model),
            "--artefact",
            str(artefact.resolve()),
            "--state",
            str(self._state),
            "--address",
            "127.0.0.1:0",
            "--enrol-address",
            "127.0.0.1:0",
            "--set",
            f"hardening={hardening}",
            *(["--front-address", "127.0.0.1:0"] if sealed else []),
            *flags,
        ]

    def __enter__(self) -> Self:
        """Raises PerfitError with what the server said when it does not start."""
        work = self.folder / "work"
        work.mkdir(parents=True)
        log = self.folder / "server.log"
        with log.open("wb") as errors:
            self._process = subprocess.Popen(
                [self._command, *self._arguments],
                cwd=work,
                env={**os.environ, "TMPDIR": str(work)},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        line = self._process.stdout.readline() if self._process.stdout else ""
        if not line.strip():
            self._process.wait(_SECONDS)
            raise PerfitError(f"the server did not start: {log.read_text('utf-8').strip()[-500:]}")
        self.said: dict[str, Any] = json.loads(line)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        try:
            self._process.wait(_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(_SECONDS)
        if self._process.stdout:
            self._process.stdout.close()

    @property
    def pid(self) -> int:
        return self._process.pid

    def invites(self, count: int) -> list[Invite]:
        if len(self._unused) < count:
            made = max(count, _INVITES)
            done = subprocess.run(
                [self._command, "invite", "--state", str(self._state), "--count", str(made)],
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode:
                raise PerfitError(f"cannot make invites: {done.stderr.strip()[-500:]}")
            self._unused += [Invite.decode(line) for line in done.stdout.split()]
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


def signature_of(csr: bytes) -> bytes:
    """What is random in a signing request and in no certificate."""
    return x509.load_der_x509_csr(csr).signature


def _pem(der: bytes) -> bytes:
    return x509.load_der_x509_certificate(der).public_bytes(serialization.Encoding.PEM)
