"""What listens where: enrolment with server TLS only, the rest over mutual TLS, or sealed behind a front.

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

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import grpc

from perfit_cloud.config import CloudConfig
from perfit_cloud.service.bounds import MessageBounds
from perfit_cloud.service.descriptors import Connections, descriptor_limit
from perfit_cloud.service.identity.server_credentials import ServerCredentials
from perfit_cloud.service.interceptor import CallInterceptor
from perfit_cloud.service.limit_factory import LimitFactory
from perfit_cloud.service.limits import MESSAGE_COPIES, AMinute, AtOnce, RateLimiter
from perfit_cloud.service.proxied import ProxiedListener
from perfit_cloud.service.sealing.calls import SealedCalls
from perfit_cloud.service.settings import (
    CallSettings,
    EnrolmentParts,
    ListenerSettings,
    SealingSettings,
    ServerParts,
)
from perfit_shared.errors import ConfigError
from perfit_shared.sealing.chunks import most_sealed_bytes

__all__ = ["Listener", "Listeners"]

_ENROL_MESSAGE_BYTES = 64 * 1024  # a lapsed certificate and a request take 1 KB
_ENROL_CALLS = 32
_ENROL_CALLS_EACH = 16  # of one address, behind which there may be a whole company
_SPARE_THREADS = 4  # for calls that are refused at once, and health checks
_ENROL_STREAMS = 4  # calls at once over one connection; enrolling makes one after the other
_ENROL_AGE_SECONDS = 20
_ENROL_IDLE_SECONDS = 5
_HANDSHAKE_SECONDS = 5  # from TCP to the first frames of HTTP/2; gRPC's own limit is 120
_DEVICE_STREAMS = 16  # calls at once over one connection; a device with more waits
_FRONT_REQUESTS_MINUTE = 60_000  # Describe in the clear, of all devices behind a front together
_FRONT_BYTES = 1 << 20  # of those requests, at once
# Sealed calls that do not open, of all callers of a front that does not say who calls. The key's work of one
# takes 0.1 ms, so this is a tenth of a core.
_FRONT_OPENINGS_MINUTE = 60_000
_OPENINGS_PART = 4  # of the calls at once whose caller is not known yet, one address has a fourth
_GRACE_SECONDS = 5
_LAST_SECONDS = 2.0  # for the ends of calls to be sent when a server stops
_DESCRIPTORS_PROXIED = 3  # of a connection that a balancer passes on: its own, and both ends of ours to gRPC


@dataclass(frozen=True)
class _ConnectionLimits:
    """What one connection may take, and how many there may be."""

    count: int
    threads: int  # of all connections together
    message_bytes: int  # largest message that comes in
    idle_seconds: int
    streams: int  # calls at once
    age_seconds: int  # then it takes no new calls
    grace_seconds: int  # after this, running calls are cut off

    def options(self, *, sent_bytes: int) -> list[tuple[str, int]]:
        """gRPC's options for a server; `sent_bytes`: largest message that goes out."""
        return [
            ("grpc.max_receive_message_length", self.message_bytes),
            ("grpc.max_send_message_length", sent_bytes),
            ("grpc.max_concurrent_streams", self.streams),
            ("grpc.max_allowed_incoming_connections", self.count),
            ("grpc.server_handshake_timeout_ms", _HANDSHAKE_SECONDS * 1000),
            ("grpc.max_connection_idle_ms", self.idle_seconds * 1000),
            ("grpc.max_connection_age_ms", self.age_seconds * 1000),
            ("grpc.max_connection_age_grace_ms", self.grace_seconds * 1000),
            ("grpc.keepalive_time_ms", 60_000),
            ("grpc.keepalive_timeout_ms", 20_000),
            ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
            ("grpc.http2.max_ping_strikes", 2),  # a client that pings more often is disconnected
            ("grpc.so_reuseport", 0),  # a second server on the port fails instead of sharing it
        ]


@dataclass(frozen=True)
class Listener:
    """A gRPC server on one address."""

    server: grpc.Server
    address: str  # "host:port" as bound
    rate_limiter: RateLimiter  # what each caller may take
    proxied: ProxiedListener | None  # what takes the connections, where they come through a balancer


class Listeners:
    """Those of one process. Ports are bound when it is made, and served from `start` on."""

    def __init__(
        self,
        config: CloudConfig,
        parts: EnrolmentParts,
        *,
        credentials: ServerCredentials,
        calls: CallSettings,
        limits: LimitFactory,
    ) -> None:
        """For devices where the parts are ServerParts, for enrolment where they have an issuer.

        Raises ConfigError when a port is taken.
        """
        self._config, self._credentials, self._calls, self._limits = config, credentials, calls, limits
        served = parts if isinstance(parts, ServerParts) else None
        connections = self._connections(served)
        self.of_devices: list[Listener] = []  # they share one RateLimiter
        self.enrolment: Listener | None = None
        self.front_address = ""  # of the last of `of_devices`, where a front ends TLS before it
        if served is not None:
            settings = self._device_settings(served)
            limited = self._device_connection(connections, served)
            self.of_devices.append(self._listen(settings, config.address, limited))
            if settings.sealing is not None:
                sealing = replace(
                    settings.sealing, strangers=self._strangers(), caller_metadata=config.front_caller.lower()
                )
                front = self._listen(replace(settings, sealing=sealing), config.front_address, limited)
                self.of_devices.append(front)
                self.front_address = front.address
        if parts.issuer is not None:
            limited = self._enrolment_connection(connections)
            self.enrolment = self._listen(self._enrolment_settings(), config.enrol_address, limited)

    @property
    def all(self) -> list[Listener]:
        return self.of_devices if self.enrolment is None else [*self.of_devices, self.enrolment]

    def start(self) -> None:
        for listener in self.all:
            listener.server.start()

    def refuse(self) -> None:
        """Take no more connections through balancers; the open ones go on."""
        for listener in self.all:
            if listener.proxied is not None:
                listener.proxied.refuse()

    def stop(self, *, is_idle: bool) -> None:
        """Close all. Where not `is_idle`, calls are under way, and are cut off."""
        for stopped in [listener.server.stop(_LAST_SECONDS if is_idle else 0) for listener in self.all]:
            stopped.wait(2 * _LAST_SECONDS)
        for listener in self.all:
            if listener.proxied is not None:
                listener.proxied.close()

    # -- how many may connect ------------------------------------------------------------------

    def _connections(self, served: ServerParts | None) -> Connections:
        """Of one listener of devices, and of enrolment."""
        config = self._config
        listeners = 2 if served is not None and served.sealing_keys is not None else 1  # of devices
        each = _DESCRIPTORS_PROXIED if config.proxy_networks else 1
        whole = Connections(listeners * config.connections, config.enrol_connections)
        connections = whole.within(descriptor_limit(), each)
        return connections._replace(devices=connections.devices // listeners)

    def _device_connection(self, connections: Connections, parts: ServerParts) -> _ConnectionLimits:
        config, threads = self._config, self._config.calls + _SPARE_THREADS
        message_bytes = parts.catalog.limits.message_bytes
        return _ConnectionLimits(
            count=connections.devices,
            threads=threads,
            message_bytes=most_sealed_bytes(message_bytes) if parts.sealing_keys else message_bytes,
            idle_seconds=config.idle_seconds,
            streams=min(_DEVICE_STREAMS, threads // 2),
            age_seconds=config.call_seconds,
            # A call that began at the very end of the age still gets all its time.
            grace_seconds=max(config.call_seconds, config.stream_seconds) + _GRACE_SECONDS,
        )

    def _enrolment_connection(self, connections: Connections) -> _ConnectionLimits:
        return _ConnectionLimits(
            count=connections.enrolment,
            threads=_ENROL_CALLS + _SPARE_THREADS,
            message_bytes=_ENROL_MESSAGE_BYTES,
            idle_seconds=min(_ENROL_IDLE_SECONDS, self._config.idle_seconds),
            streams=_ENROL_STREAMS,
            age_seconds=_ENROL_AGE_SECONDS,
            grace_seconds=_GRACE_SECONDS,
        )

    # -- who is let in, and for how much -------------------------------------------------------

    def _device_settings(self, parts: ServerParts) -> ListenerSettings:
        config, limits, memory = self._config, parts.catalog.limits, parts.memory
        at_once: dict[AtOnce, int] = {
            "calls": config.calls_each,
            "answers": config.answers_each,
            "adaptations": config.adaptations_each,
            "gradients": config.gradients_each,
            "bytes": max(limits.message_bytes, min(config.bytes_each, memory.messages_each)),
        }
        a_minute: dict[AMinute, int] = {"requests": config.requests_minute, "tokens": config.tokens_minute}
        sealing = None
        if parts.sealing_keys is not None:
            opened = SealedCalls(parts.sealing_keys, parts.authenticator, certificates=config.sealing_devices)
            sealing = SealingSettings(opened, self._limits.concurrency("openings", config.calls))
        return ListenerSettings(
            sealing=sealing,
            message_bytes=limits.message_bytes,
            authenticator=parts.authenticator,
            rate_limiter=self._limits.rates("devices", at_once, a_minute),
            limit=self._limits.concurrency("calls", config.calls),
            room=self._limits.budget("messages", memory.messages),
            bounds=MessageBounds.of_devices(limits, parts.catalog.tensor_bytes),
            tokens={
                "Generate": limits.prompt_tokens,
                "Ask": limits.prompt_tokens,
                "Score": limits.call_tokens,
                "ComputeGradient": limits.call_tokens,
                "Adapt": limits.adapt_tokens,
            },
        )

    def _strangers(self) -> RateLimiter:
        """Of who asks through a front which keys there are, or has not proven who it is.

        A caller is an address where the front or a balancer says it, else the whole front.
        """
        config = self._config
        says_who = bool(config.front_caller or config.proxy_networks)
        at_once: dict[AtOnce, int] = {
            "calls": config.calls,
            "bytes": _FRONT_BYTES,
            "openings": max(1, config.calls // _OPENINGS_PART) if says_who else config.calls,
        }
        a_minute: dict[AMinute, int] = {
            "requests": _FRONT_REQUESTS_MINUTE,
            "openings": config.front_openings_minute if says_who else _FRONT_OPENINGS_MINUTE,
        }
        return self._limits.rates("front", at_once, a_minute)

    def _enrolment_settings(self) -> ListenerSettings:
        at_once: dict[AtOnce, int] = {
            "calls": _ENROL_CALLS_EACH,
            "bytes": _ENROL_CALLS_EACH * _ENROL_MESSAGE_BYTES,
        }
        a_minute: dict[AMinute, int] = {"requests": self._config.enrol_requests_minute}
        return ListenerSettings(
            authenticator=None,
            rate_limiter=self._limits.rates("enrolment", at_once, a_minute),
            limit=self._limits.concurrency("enrol_calls", _ENROL_CALLS),
            room=self._limits.budget("enrol_messages", MESSAGE_COPIES * _ENROL_CALLS * _ENROL_MESSAGE_BYTES),
            bounds=MessageBounds.of_enrolment(),
            message_bytes=_ENROL_MESSAGE_BYTES,
        )

    # -- binding -------------------------------------------------------------------------------

    def _listen(self, settings: ListenerSettings, address: str, limited: _ConnectionLimits) -> Listener:
        """Bound to `address`. Raises ConfigError when it cannot be."""
        config, proxied = self._config, None
        if config.proxy_networks:
            proxied = ProxiedListener(
                address, config.balancers(), connections=limited.count, header_seconds=_HANDSHAKE_SECONDS
            )
            settings = replace(settings, peer_of=proxied.peer_of)
        server = grpc.server(
            ThreadPoolExecutor(limited.threads, thread_name_prefix="perfit-rpc"),
            interceptors=[CallInterceptor(settings, self._calls)],
            # Beyond this gRPC itself refuses with RESOURCE_EXHAUSTED, before a thread is taken.
            maximum_concurrent_rpcs=2 * limited.threads,
            options=limited.options(sent_bytes=most_sealed_bytes(config.message_bytes)),
        )
        try:
            listens = address if proxied is None else "127.0.0.1:0"
            port = server.add_secure_port(listens, self._tls(settings))
        except RuntimeError:
            port = 0
        if port == 0:
            raise ConfigError(f"cannot listen on {address}; is the port taken, or the host not ours?")
        if proxied is not None:
            proxied.start(port)
            port = proxied.port
        return Listener(server, f"{address.rpartition(':')[0]}:{port}", settings.rate_limiter, proxied)

    def _tls(self, settings: ListenerSettings) -> grpc.ServerCredentials:
        """With an authenticator callers must show a certificate, but for those behind a front."""
        is_front = settings.sealing is not None and settings.sealing.strangers is not None
        authenticator = None if is_front else settings.authenticator
        client_cas = None if authenticator is None else lambda: authenticator.device_ca_pem
        return self._credentials.credentials(client_cas)
