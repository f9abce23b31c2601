"""The two listeners: enrolment with server TLS only, everything else over mutual TLS.

gRPC gives a call its thread before the call's message has come, so that headers alone hold a thread, and
no code of ours runs that could end it. Therefore a connection has few calls at once and a bounded age,
after which its calls are cut off. What a call costs once its message is there (answers, updates) is
counted by device, and ends with the call's time whether or not its caller reads. So nobody starves the
others over one connection. Over many connections (five on the enrolment listener, which anybody may open)
the threads can still all be taken, for as long as they are opened anew; a firewall or proxy in front that
counts connections per address is the help against that.
"""

from __future__ import annotations

import fcntl
import json
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from perfit_cloud.config import CloudConfig, parse_address
from perfit_cloud.engine.steps import StepQueue
from perfit_cloud.service.adapt import Adapting
from perfit_cloud.service.ask import Asking
from perfit_cloud.service.authority import Authority, ServerIdentity
from perfit_cloud.service.calls import Answers, Generation, Gradients
from perfit_cloud.service.codec import PromptReader, encode_description
from perfit_cloud.service.guard import Guard
from perfit_cloud.service.limits import Gate, Quota
from perfit_cloud.service.served import Served
from perfit_cloud.service.servicers import EnrollmentService, IdentityService, PersonalizationService
from perfit_shared.errors import ConfigError
from perfit_shared.wire import enrollment_pb2_grpc, personalization_pb2_grpc

__all__ = ["Addresses", "CloudServer", "only_server"]

_ENROL_MESSAGE_BYTES = 64 * 1024  # a lapsed certificate and a request take 1 KB
_ENROL_CALLS = 16
_SPARE_THREADS = 4  # for calls that are refused at once, and health checks
_ENROL_STREAMS = 4  # calls at once over one connection; enrolling makes one after the other
_ENROL_AGE_SECONDS = 20
_DEVICE_STREAMS = 16  # calls at once over one connection; a device that makes more waits by itself
_GRACE_SECONDS = 5
_ADDRESSES = "addresses.json"


@dataclass(frozen=True)
class Addresses:
    """host:port that devices dial."""

    address: str  # mutual TLS
    enrol_address: str  # enrolment

    def save(self, state: Path) -> None:
        new = state / f"{_ADDRESSES}.new"
        new.write_text(json.dumps(asdict(self)), "utf-8")
        new.replace(state / _ADDRESSES)

    @classmethod
    def load(cls, state: Path) -> Addresses:
        """Where the server of this state folder was last reached. Raises ConfigError if none ran."""
        try:
            return cls(**json.loads((state / _ADDRESSES).read_text("utf-8")))
        except FileNotFoundError:
            raise ConfigError(
                f"no server has run with the state folder {state}; start `perfit-cloud serve` first, or "
                "name its folder with --state"
            ) from None
        except (OSError, ValueError, TypeError) as error:
            raise ConfigError(f"{state / _ADDRESSES} is damaged; start `perfit-cloud serve` again") from error


@dataclass(frozen=True)
class _Connection:
    """What one connection may take."""

    streams: int  # calls at once
    age_seconds: int  # then it takes no new calls
    grace_seconds: int  # and after this the ones that still run are cut off


class CloudServer:
    """Both gRPC servers. Ports are bound when it is made, and served from `start` on."""

    def __init__(
        self,
        config: CloudConfig,
        *,
        authority: Authority,
        served: Served,
        generation: Generation,
        gradients: Gradients,
        steps: StepQueue,
    ) -> None:
        """Raises ConfigError when a port is taken."""
        self._config = config
        self._authority = authority
        self._health = health.HealthServicer()
        threads = config.calls + _SPARE_THREADS
        self._server = self._make(
            self._guard(authority, calls=config.calls),
            threads=threads,
            message_bytes=config.message_bytes,
            connection=_Connection(
                min(_DEVICE_STREAMS, threads // 2),
                config.call_seconds,
                # A call that began at the very end of the age still gets all its time.
                max(config.call_seconds, config.stream_seconds) + _GRACE_SECONDS,
            ),
        )
        self._enrol_server = self._make(
            self._guard(None, calls=_ENROL_CALLS),
            threads=_ENROL_CALLS + _SPARE_THREADS,
            message_bytes=_ENROL_MESSAGE_BYTES,
            connection=_Connection(_ENROL_STREAMS, _ENROL_AGE_SECONDS, _GRACE_SECONDS),
        )
        self._credentials = _RotatingIdentity(authority, self._names())
        bound = self._bind(self._server, config.address, client_ca=authority.device_ca_pem)
        enrol_bound = self._bind(self._enrol_server, config.enrol_address, client_ca=None)
        self.addresses = Addresses(
            address=config.public_address or bound,
            enrol_address=config.public_enrol_address or enrol_bound,
        )
        self._register(served, generation, gradients, steps)

    def start(self) -> None:
        """Begin to answer, and leave the addresses where `perfit-cloud invite` finds them."""
        self._server.start()
        self._enrol_server.start()
        self.addresses.save(self._config.state)

    def stop(self, grace: float) -> None:
        """Turn health to NOT_SERVING, refuse new calls, let running ones end within `grace` seconds."""
        self._health.enter_graceful_shutdown()
        stopping = [server.stop(grace) for server in (self._server, self._enrol_server)]
        for stopped in stopping:
            stopped.wait()

    # -- building --------------------------------------------------------------------------------

    def _make(
        self, guard: Guard, *, threads: int, message_bytes: int, connection: _Connection
    ) -> grpc.Server:
        return grpc.server(
            ThreadPoolExecutor(threads, thread_name_prefix="perfit-rpc"),
            interceptors=[guard],
            # Beyond this gRPC itself refuses with RESOURCE_EXHAUSTED, before a thread is taken.
            maximum_concurrent_rpcs=2 * threads,
            options=[
                ("grpc.max_receive_message_length", message_bytes),
                ("grpc.max_send_message_length", message_bytes),
                ("grpc.max_concurrent_streams", connection.streams),
                ("grpc.max_connection_idle_ms", self._config.idle_seconds * 1000),
                ("grpc.max_connection_age_ms", connection.age_seconds * 1000),
                ("grpc.max_connection_age_grace_ms", connection.grace_seconds * 1000),
                ("grpc.keepalive_time_ms", 60_000),
                ("grpc.keepalive_timeout_ms", 20_000),
                ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
                ("grpc.http2.max_ping_strikes", 2),  # who pings more often than that is hung up on
                ("grpc.so_reuseport", 0),  # a second server on the port fails instead of sharing it
            ],
        )

    def _guard(self, authority: Authority | None, *, calls: int) -> Guard:
        config = self._config
        return Guard(
            authority=authority,
            gate=Gate(running=calls, waiting=0, retry_ms=config.retry_ms),
            call_seconds=config.call_seconds,
            stream_seconds=config.stream_seconds,
        )

    def _bind(self, server: grpc.Server, address: str, *, client_ca: bytes | None) -> str:
        """ "host:port" as bound."""
        credentials = self._credentials.credentials(client_ca)
        try:
            port = server.add_secure_port(address, credentials)
        except RuntimeError:
            port = 0
        if port == 0:
            raise ConfigError(f"cannot listen on {address}; is the port taken, or the host not ours?")
        return f"{address.rpartition(':')[0]}:{port}"

    def _names(self) -> list[str]:
        """Host names and IPs for the server's certificate."""
        config = self._config
        dialled = [
            parse_address(config.public_address or config.address)[0],
            parse_address(config.public_enrol_address or config.enrol_address)[0],
        ]
        return [*dialled, *config.names, "localhost", "127.0.0.1", "::1"]

    def _register(
        self, served: Served, generation: Generation, gradients: Gradients, steps: StepQueue
    ) -> None:
        config = self._config
        reader = PromptReader(served.base, served.limits)
        answers = Answers(
            generation,
            reader,
            served.limits,
            places=Gate(running=config.streams, waiting=0, retry_ms=config.retry_ms),
            each=Quota(each=config.answers_each, retry_ms=config.retry_ms),
            seconds=config.call_seconds,
        )
        personalization = PersonalizationService(
            served,
            reader,
            description=encode_description(served, continuous=generation.continuous, keeps=steps.keeps),
            answers=answers,
            gradients=gradients,
            passes=Gate(running=1, waiting=config.gradient_waiting, retry_ms=config.retry_ms),
            asking=Asking(served, answers, stream_seconds=config.stream_seconds),
            adapting=Adapting(
                served,
                reader,
                queue=steps,
                streams=Gate(running=config.adaptations, waiting=0, retry_ms=config.retry_ms),
                each=Quota(each=config.adaptations_each, retry_ms=config.retry_ms),
                stream_seconds=config.stream_seconds,
            ),
            call_seconds=config.call_seconds,
        )
        enrollment = EnrollmentService(self._authority, self.addresses.address)
        identity = IdentityService(self._authority, self.addresses.address)
        personalization_pb2_grpc.add_PersonalizationServicer_to_server(personalization, self._server)
        enrollment_pb2_grpc.add_IdentityServicer_to_server(identity, self._server)
        enrollment_pb2_grpc.add_EnrollmentServicer_to_server(enrollment, self._enrol_server)
        for server in (self._server, self._enrol_server):
            health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        for service in ("Personalization", "Identity", "Enrollment"):
            self._health.set(f"perfit.v1.{service}", health_pb2.HealthCheckResponse.SERVING)


class _RotatingIdentity:
    """The server's certificate, replaced at half its life without a restart."""

    def __init__(self, authority: Authority, names: Sequence[str]) -> None:
        self._authority = authority
        self._names = names
        self._lock = threading.Lock()
        self._identity = authority.server_identity(names)

    def credentials(self, client_ca: bytes | None) -> grpc.ServerCredentials:
        """With `client_ca`, callers must show a certificate that it issued."""

        def current() -> grpc.ServerCertificateConfiguration:
            identity = self._current()
            return grpc.ssl_server_certificate_configuration(
                [(identity.key_pem, identity.certificate_pem)], root_certificates=client_ca
            )

        return grpc.dynamic_ssl_server_credentials(
            current(), current, require_client_authentication=client_ca is not None
        )

    def _current(self) -> ServerIdentity:
        with self._lock:
            if time.time() >= self._identity.renew_at:
                self._identity = self._authority.server_identity(self._names)
            return self._identity


@contextmanager
def only_server(state: Path) -> Iterator[None]:
    """Hold the state folder as its only server; the lock ends with the process, however that ends.

    Raises ConfigError when another server holds it.
    """
    with (state / "serve.lock").open("wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(f"another perfit-cloud serves from {state}; stop it, or give --state") from None
        yield
