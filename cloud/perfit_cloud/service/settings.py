"""Settings objects that several parts of the service share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from perfit_cloud.engine.gradients.scheduler import GradientScheduler
from perfit_cloud.engine.interface import Engine
from perfit_cloud.service.bounds import MessageBounds
from perfit_cloud.service.catalog import Catalog
from perfit_cloud.service.codec import PromptReader
from perfit_cloud.service.drain import Drain
from perfit_cloud.service.identity.authenticator import Authenticator
from perfit_cloud.service.identity.authority import Authority
from perfit_cloud.service.limits import Budget, ConcurrencyLimit, RateLimiter
from perfit_cloud.service.memory import MemoryPlan
from perfit_cloud.service.sealing.calls import SealedCalls
from perfit_cloud.service.sealing.keys import ReplicaKeys
from perfit_cloud.service.telemetry import Engines, Telemetry

__all__ = [
    "CallSettings",
    "EnrolmentParts",
    "ListenerSettings",
    "ModelSettings",
    "SealingSettings",
    "ServerParts",
]


@dataclass(frozen=True, kw_only=True)
class EnrolmentParts:
    """What a server that has no model puts on the network."""

    authenticator: Authenticator  # who may call
    issuer: Authority | None  # who issues certificates; None: this process only serves
    ended: Callable[[], None] = lambda: None  # called at the end of every call


@dataclass(frozen=True, kw_only=True)
class ServerParts(EnrolmentParts):
    """What a server puts on the network."""

    catalog: Catalog
    generation: Engine
    scheduler: GradientScheduler
    memory: MemoryPlan  # what each part may take
    roles: tuple[str, ...] = ("answers", "updates")
    engines: Engines | None = None  # whose health is watched
    sealing_keys: ReplicaKeys | None = None  # None: no call is sealed


@dataclass(frozen=True)
class CallSettings:
    """What holds for every call, on all listeners."""

    drain: Drain
    telemetry: Telemetry
    ended: Callable[[], None]  # called at the end of every call
    call_seconds: float  # most time of a call
    stream_seconds: float  # most time of a call that streams both ways


@dataclass(frozen=True)
class SealingSettings:
    """How one listener takes sealed calls."""

    calls: SealedCalls
    openings: ConcurrencyLimit  # calls whose caller is not known yet
    # Where TLS ends before the listener, so that no caller shows a certificate: what one address may ask for
    # that is not sealed, or does not open. Sealed calls alone are taken there, but for Describe.
    # None: callers show certificates.
    strangers: RateLimiter | None = None
    caller_metadata: str = ""  # in which a front says who calls; "": it does not


@dataclass(frozen=True)
class ListenerSettings:
    """Whom one listener lets in, and for how much."""

    authenticator: Authenticator | None  # None: anybody may call, as for enrolment
    rate_limiter: RateLimiter  # what each caller may take
    limit: ConcurrencyLimit  # calls at once
    room: Budget  # bytes of all messages that are worked on
    bounds: MessageBounds
    message_bytes: int  # largest request, without what seals it
    sealing: SealingSettings | None = None
    # Most tokens of a message's texts, by the name of the method; empty where tokens are not counted.
    tokens: Mapping[str, int] = field(default_factory=dict)
    peer_of: Callable[[str], str] = (
        str  # who is behind a peer of gRPC's, where a balancer passes connections on
    )


@dataclass(frozen=True)
class ModelSettings:
    """What every RPC of the model uses."""

    catalog: Catalog
    reader: PromptReader
    rate_limiter: RateLimiter
    calls: CallSettings
