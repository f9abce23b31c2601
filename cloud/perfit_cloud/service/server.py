"""The two listeners: enrolment with server TLS only, everything else over mutual TLS.

A call holds a thread from its headers on, and is counted by device (`RateLimiter`) as soon as it has one: a
device has few calls at once over all its connections, none of them without end, whether it sends nothing or
reads nothing, and what is over its share is refused before its message is taken. On the enrolment listener,
which anybody may open, the same is counted by network address. A connection has few calls at once and a
bounded age. What remains: several devices (or addresses) together can take all calls for as long as they
like to.

Connections are counted by listener (`service/descriptors.py`): whoever says nothing is cut off after a few
seconds, and those to the enrolment listener cannot take what devices need. One address may still take all
connections of a listener for as long as it goes on, so that a firewall in front should count them.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from types import MappingProxyType

import grpc
from grpc_health.v1 import health_pb2_grpc

from perfit_cloud.config import CloudConfig, parse_address
from perfit_cloud.engine.gradients.scheduler import GradientScheduler
from perfit_cloud.engine.interface import Engine
from perfit_cloud.service.bounds import MessageBounds
from perfit_cloud.service.calls import Answers, Gradients
from perfit_cloud.service.catalog import Catalog
from perfit_cloud.service.codec import PromptReader, encode_description
from perfit_cloud.service.descriptors import Connections, descriptor_limit, open_descriptors
from perfit_cloud.service.drain import Drain
from perfit_cloud.service.health import HealthMonitor
from perfit_cloud.service.identity.authority import Authority, ServerIdentity
from perfit_cloud.service.interceptor import CallInterceptor
from perfit_cloud.service.limits import (
    MESSAGE_COPIES,
    AMinute,
    AtOnce,
    Budget,
    ConcurrencyLimit,
    Quota,
    RateLimiter,
)
from perfit_cloud.service.memory import MemoryPlan
from perfit_cloud.service.servicers import EnrollmentService, IdentityService, PersonalizationService
from perfit_cloud.service.state_folder import Addresses
from perfit_cloud.service.streams.adapt import Adapting
from perfit_cloud.service.streams.ask import Asking
from perfit_cloud.service.telemetry import Engines, Telemetry
from perfit_shared.errors import ConfigError
from perfit_shared.wire import enrollment_pb2_grpc, personalization_pb2_grpc

__all__ = ["CloudServer"]

_ENROL_MESSAGE_BYTES = 64 * 1024  # a lapsed certificate and a request take 1 KB
_ENROL_CALLS = 32
_ENROL_CALLS_EACH = 16  # of one address, behind which there may be a whole company
_SPARE_THREADS = 4  # for calls that are refused at once, and health checks
_ENROL_STREAMS = 4  # calls at once over one connection; enrolling makes one after the other
_ENROL_AGE_SECONDS = 20
_ENROL_IDLE_SECONDS = 5
_HANDSHAKE_SECONDS = 5  # of TCP to the first frames of HTTP/2, at most; gRPC itself would wait for 120
_DEVICE_STREAMS = 16  # calls at once over one connection; a device that makes more waits by itself
_GRACE_SECONDS = 5
_LAST_SECONDS = 2.0  # for the ends of calls to be sent when a server stops


@dataclass(frozen=True)
class _Connection:
    """What one connection may take, and how many there may be."""

    count: int
    idle_seconds: int
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
        served: Catalog,
        generation: Engine,
        gradients: Gradients,
        steps: GradientScheduler,
        memory: MemoryPlan,
        engines: Engines | None = None,
        ended: Callable[[], None] = lambda: None,
    ) -> None:
        """`memory`: what each part may take. `engines`: whose health is watched.

        `ended` is called at the end of every call.
        Raises ConfigError when a port is taken.
        """
        self._config = config
        self._authority = authority
        self.telemetry = Telemetry()
        self._drain = Drain()
        self._ended = ended
        self._watch = HealthMonitor(engines, self.telemetry, stuck_seconds=config.stuck_seconds)
        self._rate_limiter = self._shared(
            "devices",
            {
                "calls": config.calls_each,
                "answers": config.answers_each,
                "adaptations": config.adaptations_each,
                "gradients": config.gradients_each,
                "bytes": max(served.limits.message_bytes, min(config.bytes_each, memory.messages_each)),
            },
            {"requests": config.requests_minute, "tokens": config.tokens_minute},
        )
        enrol_accounts = self._shared(
            "enrolment",
            {"calls": _ENROL_CALLS_EACH, "bytes": _ENROL_CALLS_EACH * _ENROL_MESSAGE_BYTES},
            {"requests": config.enrol_requests_minute},
        )
        threads = config.calls + _SPARE_THREADS
        limits = served.limits
        device_guard = self._guard(
            self._rate_limiter,
            self._gate("calls", config.calls),
            self._budget("messages", memory.messages),
            MessageBounds.of_devices(limits, served.tensor_bytes),
            authority=authority,
            tokens={
                "Generate": limits.prompt_tokens,
                "Ask": limits.prompt_tokens,
                "Score": limits.call_tokens,
                "ComputeGradient": limits.call_tokens,
                "Adapt": limits.adapt_tokens,
            },
        )
        enrol_guard = self._guard(
            enrol_accounts,
            self._gate("enrol_calls", _ENROL_CALLS),
            self._budget("enrol_messages", MESSAGE_COPIES * _ENROL_CALLS * _ENROL_MESSAGE_BYTES),
            MessageBounds.of_enrolment(),
        )
        connections = Connections(config.connections, config.enrol_connections).within(descriptor_limit())
        self._server = self._make(
            device_guard,
            threads=threads,
            message_bytes=limits.message_bytes,
            connection=_Connection(
                connections.devices,
                config.idle_seconds,
                min(_DEVICE_STREAMS, threads // 2),
                config.call_seconds,
                # A call that began at the very end of the age still gets all its time.
                max(config.call_seconds, config.stream_seconds) + _GRACE_SECONDS,
            ),
        )
        self._enrol_server = self._make(
            enrol_guard,
            threads=_ENROL_CALLS + _SPARE_THREADS,
            message_bytes=_ENROL_MESSAGE_BYTES,
            connection=_Connection(
                connections.enrolment,
                min(_ENROL_IDLE_SECONDS, config.idle_seconds),
                _ENROL_STREAMS,
                _ENROL_AGE_SECONDS,
                _GRACE_SECONDS,
            ),
        )
        self._credentials = _RotatingIdentity(authority, self._names())
        bound = self._bind(self._server, config.address, client_ca=authority.device_ca_pem)
        enrol_bound = self._bind(self._enrol_server, config.enrol_address, client_ca=None)
        self.addresses = Addresses(
            address=config.public_address or bound,
            enrol_address=config.public_enrol_address or enrol_bound,
        )
        self._register(served, generation, gradients, steps, self._budget("examples", memory.examples))
        self._measure(served, engines)
        self._stop_metrics = self.telemetry.serve(config.metrics_address) if config.metrics_address else None

    def start(self) -> None:
        """Begin to answer, and leave the addresses where `perfit-cloud invite` finds them."""
        self._authority.start()
        self._watch.start()
        self._server.start()
        self._enrol_server.start()
        self.addresses.save(self._config.state)

    def stop(self, grace: float, is_hurried: Callable[[], bool] = lambda: False) -> bool:
        """Turn health to NOT_SERVING, refuse new calls, let running ones end within `grace` seconds.

        Streams end between two messages. `is_hurried` is asked ten times a second; when it says so, or the
        time is over, what still runs is cut off: its caller is told so, and its thread is not waited for.
        Says whether all ended by themselves.
        """
        self._watch.stop()
        self.telemetry.draining()
        self._drain.begin()
        is_idle = self._drain.wait(grace, is_hurried)
        servers = (self._server, self._enrol_server)
        for stopped in [server.stop(_LAST_SECONDS if is_idle else 0) for server in servers]:
            stopped.wait(2 * _LAST_SECONDS)
        if self._stop_metrics is not None:
            self._stop_metrics()
            self._stop_metrics = None
        return is_idle

    # -- building --------------------------------------------------------------------------------

    def _make(
        self, guard: CallInterceptor, *, threads: int, message_bytes: int, connection: _Connection
    ) -> grpc.Server:
        return grpc.server(
            ThreadPoolExecutor(threads, thread_name_prefix="perfit-rpc"),
            interceptors=[guard],
            # Beyond this gRPC itself refuses with RESOURCE_EXHAUSTED, before a thread is taken.
            maximum_concurrent_rpcs=2 * threads,
            options=[
                ("grpc.max_receive_message_length", message_bytes),
                ("grpc.max_send_message_length", self._config.message_bytes),
                ("grpc.max_concurrent_streams", connection.streams),
                ("grpc.max_allowed_incoming_connections", connection.count),
                ("grpc.server_handshake_timeout_ms", _HANDSHAKE_SECONDS * 1000),
                ("grpc.max_connection_idle_ms", connection.idle_seconds * 1000),
                ("grpc.max_connection_age_ms", connection.age_seconds * 1000),
                ("grpc.max_connection_age_grace_ms", connection.grace_seconds * 1000),
                ("grpc.keepalive_time_ms", 60_000),
                ("grpc.keepalive_timeout_ms", 20_000),
                ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
                ("grpc.http2.max_ping_strikes", 2),  # who pings more often than that is hung up on
                ("grpc.so_reuseport", 0),  # a second server on the port fails instead of sharing it
            ],
        )

    def _guard(
        self,
        rate_limiter: RateLimiter,
        gate: ConcurrencyLimit,
        room: Budget,
        bounds: MessageBounds,
        *,
        authority: Authority | None = None,
        tokens: Mapping[str, int] = MappingProxyType({}),
    ) -> CallInterceptor:
        config = self._config
        prefix = "enrol_" if authority is None else ""
        return CallInterceptor(
            authority=authority,
            rate_limiter=rate_limiter,
            gate=gate,
            room=room,
            bounds=bounds,
            tokens=tokens,
            refused=lambda reason: self.telemetry.refused(prefix + reason),
            drain=self._drain,
            telemetry=self.telemetry,
            ended=self._ended,
            call_seconds=config.call_seconds,
            stream_seconds=config.stream_seconds,
        )

    def _gate(self, name: str, places: int) -> ConcurrencyLimit:
        retry_ms, refused = self._config.retry_ms, self.telemetry.refused
        return ConcurrencyLimit(name, places=places, retry_ms=retry_ms, refused=refused)

    def _budget(self, name: str, size: int) -> Budget:
        return Budget(name, size, retry_ms=self._config.retry_ms, refused=self.telemetry.refused)

    def _shared(self, listener: str, at_once: dict[AtOnce, int], a_minute: dict[AMinute, int]) -> RateLimiter:
        prefix = "" if listener == "devices" else "enrol_"
        rate_limiter = RateLimiter(
            Quota(at_once, a_minute),
            retry_ms=self._config.retry_ms,
            refused=lambda limit: self.telemetry.refused(prefix + limit),
        )
        self.telemetry.callers(listener, lambda: len(rate_limiter))
        return rate_limiter

    def _measure(self, served: Catalog, engines: Engines | None) -> None:
        if engines is not None:
            self.telemetry.watch(engines)
        self.telemetry.describe(
            version=metadata.version("perfit"),
            fingerprint=served.base.fingerprint,
            artefacts=",".join(f"{a.name}:{a.version}" for a in served.artefacts.values()),
        )
        self.telemetry.descriptors(open_descriptors, descriptor_limit)
        ends = {name: partial(float, end) for name, end in self._authority.ends().items()}
        self.telemetry.certificates({"server": self._credentials.ends_at, **ends})
        self.telemetry.identities(lambda: self._authority.identities_age_seconds)

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
        self,
        served: Catalog,
        generation: Engine,
        gradients: Gradients,
        steps: GradientScheduler,
        room: Budget,
    ) -> None:
        config = self._config
        passes = self._gate("gradients", 1 + config.gradient_waiting)
        self.telemetry.line("gradients", lambda: max(0, passes.working - 1))
        reader = PromptReader(served.base, served.limits)
        answers = Answers(
            generation,
            reader,
            served.limits,
            places=self._gate("answers", config.streams),
            rate_limiter=self._rate_limiter,
            telemetry=self.telemetry,
            seconds=config.call_seconds,
        )
        personalization = PersonalizationService(
            served,
            reader,
            description=encode_description(served, continuous=generation.continuous, keeps=steps.keeps),
            answers=answers,
            gradients=gradients,
            passes=passes,
            rate_limiter=self._rate_limiter,
            telemetry=self.telemetry,
            asking=Asking(served, answers, drain=self._drain, stream_seconds=config.stream_seconds),
            adapting=Adapting(
                served,
                reader,
                queue=steps,
                streams=self._gate("adaptations", config.adaptations),
                room=room,
                rate_limiter=self._rate_limiter,
                drain=self._drain,
                telemetry=self.telemetry,
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
            health_pb2_grpc.add_HealthServicer_to_server(self._watch.health, server)


class _RotatingIdentity:
    """The server's certificate, replaced at half its life without a restart."""

    def __init__(self, authority: Authority, names: Sequence[str]) -> None:
        self._authority = authority
        self._names = names
        self._lock = threading.Lock()
        self._identity = authority.server_identity(names)

    def credentials(self, client_ca: bytes | None) -> grpc.ServerCredentials:
        """With `client_ca`, callers must show a certificate that it issued."""

        given = self._current()

        def configuration() -> grpc.ServerCertificateConfiguration:
            return grpc.ssl_server_certificate_configuration(
                [(given.key_pem, given.certificate_pem)], root_certificates=client_ca
            )

        def renewed() -> grpc.ServerCertificateConfiguration | None:
            """Asked at every handshake; None: the one that gRPC has.

            When it is given one, gRPC frees what it has, and other handshakes of that moment may be using
            it: devices that came back together after a cut ended the process.
            """
            nonlocal given
            current = self._current()
            if current is given:
                return None
            given = current
            return configuration()

        return grpc.dynamic_ssl_server_credentials(
            configuration(),
            renewed,  # type: ignore[arg-type]  # the stubs do not know of the documented None
            require_client_authentication=client_ca is not None,
        )

    def ends_at(self) -> float:
        """Unix seconds."""
        return self._identity.ends_at

    def _current(self) -> ServerIdentity:
        with self._lock:
            # Before its time too: it was made while the clock was ahead, and nobody takes it now.
            if not self._identity.starts_at <= time.time() < self._identity.renew_at:
                self._identity = self._authority.server_identity(self._names)
            return self._identity
