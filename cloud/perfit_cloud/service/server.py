"""The cloud's server: what answers on which listener, and how it starts and stops."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import metadata

from grpc_health.v1 import health_pb2_grpc

from perfit_cloud.config import CloudConfig, parse_addresses
from perfit_cloud.service.calls import Answers
from perfit_cloud.service.codec import PromptReader, encode_description
from perfit_cloud.service.descriptors import descriptor_limit, open_descriptors
from perfit_cloud.service.drain import Drain
from perfit_cloud.service.health import HealthMonitor
from perfit_cloud.service.identity.server_credentials import ServerCredentials
from perfit_cloud.service.identity.server_files import ServerFiles
from perfit_cloud.service.identity.server_identity import ServerIdentity
from perfit_cloud.service.limit_factory import LimitFactory
from perfit_cloud.service.listeners import Listeners
from perfit_cloud.service.servicers import (
    EnrollmentService,
    IdentityService,
    PersonalizationService,
    ServersService,
)
from perfit_cloud.service.settings import CallSettings, EnrolmentParts, ModelSettings, ServerParts
from perfit_cloud.service.state_folder import Addresses
from perfit_cloud.service.streams.adapt import Adapting
from perfit_cloud.service.streams.ask import Asking
from perfit_cloud.service.telemetry import Telemetry
from perfit_shared.wire import enrollment_pb2_grpc, personalization_pb2_grpc

__all__ = ["CloudServer"]


class CloudServer:
    """All gRPC servers of a process. Ports are bound when it is made, and served from `start` on.

    Without an issuer it has no key of an authority, and neither enrols nor renews. Without a model it does
    nothing else.
    """

    def __init__(self, config: CloudConfig, parts: EnrolmentParts) -> None:
        """Devices are served where the parts are ServerParts. Raises ConfigError when a port is taken."""
        self._config = config
        self._parts = parts
        served = parts if isinstance(parts, ServerParts) else None
        self.telemetry = Telemetry()
        self._limits = LimitFactory(self.telemetry, retry_ms=config.retry_ms)
        self._drain = Drain()
        self._calls = CallSettings(
            self._drain, self.telemetry, parts.ended, config.call_seconds, config.stream_seconds
        )
        self._health = HealthMonitor(
            served.engines if served else None,
            self.telemetry,
            stuck_seconds=config.stuck_seconds,
            is_deaf=lambda: parts.authenticator.is_deaf,
        )
        self._credentials = ServerCredentials(*self._server_identity())
        self._listeners = listeners = Listeners(
            config, parts, credentials=self._credentials, calls=self._calls, limits=self._limits
        )
        bound = listeners.of_devices[0].address if listeners.of_devices else ""
        enrol_bound = listeners.enrolment.address if listeners.enrolment is not None else ""
        self.front_address = listeners.front_address
        self.addresses = Addresses(
            address=config.public_address or bound, enrol_address=config.public_enrol_address or enrol_bound
        )
        if served is not None:
            self._register_model(served)
        self._register_identity()
        self._measure(served)
        self._stop_metrics = self.telemetry.serve(config.metrics_address) if config.metrics_address else None

    def start(self) -> None:
        """Begin to answer, and leave the addresses where `perfit-cloud invite` finds them."""
        self._parts.authenticator.start()
        self._health.start()
        self._listeners.start()
        if self._parts.issuer is not None:
            self.addresses.save(self._config.state)

    def stop(self, grace: float, is_hurried: Callable[[], bool] = lambda: False) -> bool:
        """Turn health to NOT_SERVING, refuse new calls, let running ones end within `grace` seconds.

        Streams end between two messages. When the time is over, or `is_hurried`, which is asked ten times a
        second, the rest is cut off: the callers get an error, and nobody waits for the threads. Returns
        whether all calls ended by themselves.
        """
        self.telemetry.draining()  # first: a probe should not take it for ill
        self._health.stop()
        self._drain.begin()
        self._listeners.refuse()
        is_idle = self._drain.wait(grace, is_hurried)
        self._listeners.stop(is_idle=is_idle)
        if self._stop_metrics is not None:
            self._stop_metrics()
            self._stop_metrics = None
        return is_idle

    # -- the server's certificate --------------------------------------------------------------

    def _server_identity(self) -> tuple[Callable[[], ServerIdentity], Callable[[ServerIdentity], bool]]:
        """What ServerCredentials takes."""
        config, issuer = self._config, self._parts.issuer
        if issuer is not None:
            return partial(issuer.server_identity, self._names()), issuer.servers.is_current
        files = ServerFiles(config.state, trusts_group=config.state_writers == "group")
        return files.identity, files.is_current

    def _names(self) -> list[str]:
        """Host names and IPs for the server's certificate."""
        config = self._config
        addresses = (
            config.public_address or config.address,
            config.public_enrol_address or config.enrol_address,
        )
        dialled = [host for each in addresses for host, _ in parse_addresses(each)]
        return [*dialled, *config.names, "localhost", "127.0.0.1", "::1"]

    # -- what answers ----------------------------------------------------------------------------

    def _register_model(self, parts: ServerParts) -> None:
        config = self._config
        catalog, scheduler = parts.catalog, parts.scheduler
        rate_limiter = self._listeners.of_devices[0].rate_limiter
        passes = self._limits.concurrency("gradients", 1 + config.gradient_waiting)
        self.telemetry.line("gradients", lambda: max(0, passes.working - 1))
        model = ModelSettings(catalog, PromptReader(catalog.base, catalog.limits), rate_limiter, self._calls)
        answers = Answers(
            parts.generation,
            model.reader,
            catalog.limits,
            limit=self._limits.concurrency("answers", config.streams),
            rate_limiter=rate_limiter,
            telemetry=self.telemetry,
            seconds=config.call_seconds,
        )
        personalization = PersonalizationService(
            model,
            roles=parts.roles,
            description=encode_description(
                catalog,
                continuous=parts.generation.continuous,
                caches_activations=scheduler.caches_activations,
            ),
            sealing_keys=parts.sealing_keys,
            answers=answers,
            scheduler=scheduler,
            passes=passes,
            asking=Asking(catalog, answers, drain=self._drain, stream_seconds=config.stream_seconds),
            adapting=Adapting(
                model,
                scheduler=scheduler,
                streams=self._limits.concurrency("adaptations", config.adaptations),
                room=self._limits.budget("examples", parts.memory.examples),
            ),
        )
        for listener in self._listeners.of_devices:
            personalization_pb2_grpc.add_PersonalizationServicer_to_server(personalization, listener.server)

    def _register_identity(self) -> None:
        """Health everywhere; renewal and enrolment where certificates are issued."""
        for listener in self._listeners.all:
            health_pb2_grpc.add_HealthServicer_to_server(self._health.health, listener.server)
        issuer, address = self._parts.issuer, self.addresses.address
        identity = IdentityService(self._parts.authenticator, issuer, address)
        for listener in self._listeners.of_devices:
            enrollment_pb2_grpc.add_IdentityServicer_to_server(identity, listener.server)
        enrolment = self._listeners.enrolment
        if issuer is not None and enrolment is not None:
            enrollment_pb2_grpc.add_EnrollmentServicer_to_server(
                EnrollmentService(issuer, address), enrolment.server
            )
            enrollment_pb2_grpc.add_ServersServicer_to_server(
                ServersService(issuer.servers), enrolment.server
            )

    def _measure(self, served: ServerParts | None) -> None:
        if served is not None:
            if served.engines is not None:
                self.telemetry.watch(served.engines)
            self.telemetry.describe(
                version=metadata.version("perfit"),
                fingerprint=served.catalog.base.fingerprint,
                artefacts=",".join(f"{a.name}:{a.version}" for a in served.catalog.artefacts.values()),
            )
        self.telemetry.descriptors(open_descriptors, descriptor_limit)
        authenticator = self._parts.authenticator
        ends = {name: partial(float, end) for name, end in authenticator.ends().items()}
        self.telemetry.certificates({"server": self._credentials.ends_at, **ends})
        self.telemetry.identities(lambda: authenticator.identities_age_seconds)
