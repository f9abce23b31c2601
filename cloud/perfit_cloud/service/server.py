"""The two listeners: enrolment with server TLS only, everything else over mutual TLS.

A call takes a thread when its headers arrive, and `RateLimiter` counts it by device from then on. A device
has few calls at once over all its connections. Every call ends, even if the device sends or reads nothing.
What exceeds the quota is refused before its message is read. The enrolment listener, which is open to
anybody, counts by network address. A connection has few calls at once and a bounded age. What remains:
several devices (or addresses) together can take all calls for as long as they like.

Each listener limits its connections (`service/descriptors.py`). A silent one is cut off after a few seconds,
and those for enrolment cannot take what devices need. One address can still take all connections of a
listener, so a firewall in front should limit them.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib import metadata

import grpc
from grpc_health.v1 import health_pb2_grpc

from perfit_cloud.config import CloudConfig, parse_address
from perfit_cloud.service.bounds import MessageBounds
from perfit_cloud.service.calls import Answers
from perfit_cloud.service.codec import PromptReader, encode_description
from perfit_cloud.service.descriptors import Connections, descriptor_limit, open_descriptors
from perfit_cloud.service.drain import Drain
from perfit_cloud.service.health import HealthMonitor
from perfit_cloud.service.identity.authenticator import ServerIdentity
from perfit_cloud.service.identity.server_credentials import ServerCredentials
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
from perfit_cloud.service.servicers import EnrollmentService, IdentityService, PersonalizationService
from perfit_cloud.service.settings import CallSettings, ListenerSettings, ModelSettings, ServerParts
from perfit_cloud.service.state_folder import SERVER_IDENTITY, Addresses
from perfit_cloud.service.streams.adapt import Adapting
from perfit_cloud.service.streams.ask import Asking
from perfit_cloud.service.telemetry import Telemetry
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
_HANDSHAKE_SECONDS = 5  # from TCP to the first frames of HTTP/2; gRPC's own limit is 120
_DEVICE_STREAMS = 16  # calls at once over one connection; a device with more waits
_GRACE_SECONDS = 5
_LAST_SECONDS = 2.0  # for the ends of calls to be sent when a server stops


@dataclass(frozen=True)
class _Connection:
    """What one connection may take, and how many there may be."""

    count: int
    threads: int  # of all connections together
    message_bytes: int  # largest message that comes in
    idle_seconds: int
    streams: int  # calls at once
    age_seconds: int  # then it takes no new calls
    grace_seconds: int  # after this, running calls are cut off


class CloudServer:
    """Both gRPC servers. Ports are bound when it is made, and served from `start` on.

    Without an issuer it has no key of an authority, and neither enrols nor renews.
    """

    def __init__(self, config: CloudConfig, parts: ServerParts) -> None:
        """Raises ConfigError when a port is taken."""
        self._config = config
        self._parts = parts
        self.telemetry = Telemetry()
        self._drain = Drain()
        self._calls = CallSettings(
            self._drain, self.telemetry, parts.ended, config.call_seconds, config.stream_seconds
        )
        self._health = HealthMonitor(parts.engines, self.telemetry, stuck_seconds=config.stuck_seconds)
        self._credentials = ServerCredentials(self._server_identity())
        connections = Connections(config.connections, config.enrol_connections).within(descriptor_limit())
        devices = self._device_listener()
        self._rate_limiter = devices.rate_limiter
        self._server, bound = self._listen(devices, config.address, self._device_connection(connections))
        self._servers = [self._server]
        enrol_bound = ""
        if parts.issuer is not None:
            enrol_server, enrol_bound = self._listen(
                self._enrolment_listener(), config.enrol_address, self._enrolment_connection(connections)
            )
            self._servers.append(enrol_server)
        self.addresses = Addresses(
            address=config.public_address or bound, enrol_address=config.public_enrol_address or enrol_bound
        )
        self._register_model()
        self._register_identity()
        self._measure()
        self._stop_metrics = self.telemetry.serve(config.metrics_address) if config.metrics_address else None

    def start(self) -> None:
        """Begin to answer, and leave the addresses where `perfit-cloud invite` finds them."""
        self._parts.authenticator.start()
        self._health.start()
        for server in self._servers:
            server.start()
        if self._parts.issuer is not None:
            self.addresses.save(self._config.state)

    def stop(self, grace: float, is_hurried: Callable[[], bool] = lambda: False) -> bool:
        """Turn health to NOT_SERVING, refuse new calls, let running ones end within `grace` seconds.

        Streams end between two messages. When the time is over, or `is_hurried`, which is asked ten times a
        second, the rest is cut off: the callers get an error, and nobody waits for the threads. Returns
        whether all calls ended by themselves.
        """
        self._health.stop()
        self._drain.begin()
        self.telemetry.draining()
        is_idle = self._drain.wait(grace, is_hurried)
        for stopped in [server.stop(_LAST_SECONDS if is_idle else 0) for server in self._servers]:
            stopped.wait(2 * _LAST_SECONDS)
        if self._stop_metrics is not None:
            self._stop_metrics()
            self._stop_metrics = None
        return is_idle

    # -- building --------------------------------------------------------------------------------

    def _server_identity(self) -> Callable[[], ServerIdentity]:
        config, issuer = self._config, self._parts.issuer
        if issuer is not None:
            return partial(issuer.server_identity, self._names())
        trusts_group = config.state_writers == "group"
        return partial(ServerIdentity.load, config.state / SERVER_IDENTITY, trusts_group=trusts_group)

    def _device_listener(self) -> ListenerSettings:
        config, limits, memory = self._config, self._parts.catalog.limits, self._parts.memory
        at_once: dict[AtOnce, int] = {
            "calls": config.calls_each,
            "answers": config.answers_each,
            "adaptations": config.adaptations_each,
            "gradients": config.gradients_each,
            "bytes": max(limits.message_bytes, min(config.bytes_each, memory.messages_each)),
        }
        a_minute: dict[AMinute, int] = {"requests": config.requests_minute, "tokens": config.tokens_minute}
        return ListenerSettings(
            authenticator=self._parts.authenticator,
            rate_limiter=self._rates("devices", at_once, a_minute),
            limit=self._limit("calls", config.calls),
            room=self._budget("messages", memory.messages),
            bounds=MessageBounds.of_devices(limits, self._parts.catalog.tensor_bytes),
            tokens={
                "Generate": limits.prompt_tokens,
                "Ask": limits.prompt_tokens,
                "Score": limits.call_tokens,
                "ComputeGradient": limits.call_tokens,
                "Adapt": limits.adapt_tokens,
            },
        )

    def _enrolment_listener(self) -> ListenerSettings:
        at_once: dict[AtOnce, int] = {
            "calls": _ENROL_CALLS_EACH,
            "bytes": _ENROL_CALLS_EACH * _ENROL_MESSAGE_BYTES,
        }
        return ListenerSettings(
            authenticator=None,
            rate_limiter=self._rates("enrolment", at_once, {"requests": self._config.enrol_requests_minute}),
            limit=self._limit("enrol_calls", _ENROL_CALLS),
            room=self._budget("enrol_messages", MESSAGE_COPIES * _ENROL_CALLS * _ENROL_MESSAGE_BYTES),
            bounds=MessageBounds.of_enrolment(),
        )

    def _device_connection(self, connections: Connections) -> _Connection:
        config, threads = self._config, self._config.calls + _SPARE_THREADS
        return _Connection(
            count=connections.devices,
            threads=threads,
            message_bytes=self._parts.catalog.limits.message_bytes,
            idle_seconds=config.idle_seconds,
            streams=min(_DEVICE_STREAMS, threads // 2),
            age_seconds=config.call_seconds,
            # A call that began at the very end of the age still gets all its time.
            grace_seconds=max(config.call_seconds, config.stream_seconds) + _GRACE_SECONDS,
        )

    def _enrolment_connection(self, connections: Connections) -> _Connection:
        return _Connection(
            count=connections.enrolment,
            threads=_ENROL_CALLS + _SPARE_THREADS,
            message_bytes=_ENROL_MESSAGE_BYTES,
            idle_seconds=min(_ENROL_IDLE_SECONDS, self._config.idle_seconds),
            streams=_ENROL_STREAMS,
            age_seconds=_ENROL_AGE_SECONDS,
            grace_seconds=_GRACE_SECONDS,
        )

    def _listen(
        self, listener: ListenerSettings, address: str, connection: _Connection
    ) -> tuple[grpc.Server, str]:
        """A server, and "host:port" as bound. With an authenticator callers must show a certificate."""
        authenticator = listener.authenticator
        server = grpc.server(
            ThreadPoolExecutor(connection.threads, thread_name_prefix="perfit-rpc"),
            interceptors=[CallInterceptor(listener, self._calls)],
            # Beyond this gRPC itself refuses with RESOURCE_EXHAUSTED, before a thread is taken.
            maximum_concurrent_rpcs=2 * connection.threads,
            options=[
                ("grpc.max_receive_message_length", connection.message_bytes),
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
                ("grpc.http2.max_ping_strikes", 2),  # a client that pings more often is disconnected
                ("grpc.so_reuseport", 0),  # a second server on the port fails instead of sharing it
            ],
        )
        client_ca = None if authenticator is None else authenticator.device_ca_pem
        try:
            port = server.add_secure_port(address, self._credentials.credentials(client_ca))
        except RuntimeError:
            port = 0
        if port == 0:
            raise ConfigError(f"cannot listen on {address}; is the port taken, or the host not ours?")
        return server, f"{address.rpartition(':')[0]}:{port}"

    def _limit(self, name: str, slots: int) -> ConcurrencyLimit:
        retry_ms, refused = self._config.retry_ms, self.telemetry.refused
        return ConcurrencyLimit(name, slots=slots, retry_ms=retry_ms, refused=refused)

    def _budget(self, name: str, size: int) -> Budget:
        return Budget(name, size, retry_ms=self._config.retry_ms, refused=self.telemetry.refused)

    def _rates(self, listener: str, at_once: dict[AtOnce, int], a_minute: dict[AMinute, int]) -> RateLimiter:
        prefix = "" if listener == "devices" else "enrol_"
        rate_limiter = RateLimiter(
            Quota(at_once, a_minute),
            retry_ms=self._config.retry_ms,
            refused=lambda limit: self.telemetry.refused(prefix + limit),
        )
        self.telemetry.callers(listener, lambda: len(rate_limiter))
        return rate_limiter

    def _measure(self) -> None:
        parts = self._parts
        if parts.engines is not None:
            self.telemetry.watch(parts.engines)
        self.telemetry.describe(
            version=metadata.version("perfit"),
            fingerprint=parts.catalog.base.fingerprint,
            artefacts=",".join(f"{a.name}:{a.version}" for a in parts.catalog.artefacts.values()),
        )
        self.telemetry.descriptors(open_descriptors, descriptor_limit)
        authenticator = parts.authenticator
        ends = {name: partial(float, end) for name, end in authenticator.ends().items()}
        self.telemetry.certificates({"server": self._credentials.ends_at, **ends})
        self.telemetry.identities(lambda: authenticator.identities_age_seconds)

    def _names(self) -> list[str]:
        """Host names and IPs for the server's certificate."""
        config = self._config
        dialled = [
            parse_address(config.public_address or config.address)[0],
            parse_address(config.public_enrol_address or config.enrol_address)[0],
        ]
        return [*dialled, *config.names, "localhost", "127.0.0.1", "::1"]

    def _register_model(self) -> None:
        config, parts = self._config, self._parts
        catalog, scheduler = parts.catalog, parts.scheduler
        passes = self._limit("gradients", 1 + config.gradient_waiting)
        self.telemetry.line("gradients", lambda: max(0, passes.working - 1))
        model = ModelSettings(
            catalog, PromptReader(catalog.base, catalog.limits), self._rate_limiter, self._calls
        )
        answers = Answers(
            parts.generation,
            model.reader,
            catalog.limits,
            limit=self._limit("answers", config.streams),
            rate_limiter=self._rate_limiter,
            telemetry=self.telemetry,
            seconds=config.call_seconds,
        )
        personalization = PersonalizationService(
            model,
            description=encode_description(
                catalog,
                continuous=parts.generation.continuous,
                caches_activations=scheduler.caches_activations,
            ),
            answers=answers,
            scheduler=scheduler,
            passes=passes,
            asking=Asking(catalog, answers, drain=self._drain, stream_seconds=config.stream_seconds),
            adapting=Adapting(
                model,
                scheduler=scheduler,
                streams=self._limit("adaptations", config.adaptations),
                room=self._budget("examples", parts.memory.examples),
            ),
        )
        personalization_pb2_grpc.add_PersonalizationServicer_to_server(personalization, self._server)

    def _register_identity(self) -> None:
        """Health everywhere; renewal and enrolment where certificates are issued."""
        for server in self._servers:
            health_pb2_grpc.add_HealthServicer_to_server(self._health.health, server)
        issuer, address = self._parts.issuer, self.addresses.address
        if issuer is not None:
            renewal, enrolment = IdentityService(issuer, address), EnrollmentService(issuer, address)
            enrollment_pb2_grpc.add_IdentityServicer_to_server(renewal, self._server)
            enrollment_pb2_grpc.add_EnrollmentServicer_to_server(enrolment, self._servers[-1])
