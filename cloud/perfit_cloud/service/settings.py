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
from perfit_cloud.service.telemetry import Engines, Telemetry

__all__ = ["CallSettings", "ListenerSettings", "ModelSettings", "ServerParts"]


@dataclass(frozen=True)
class ServerParts:
    """What a server puts on the network."""

    authenticator: Authenticator  # who may call
    issuer: Authority | None  # who issues certificates; None: this process only serves
    catalog: Catalog
    generation: Engine
    scheduler: GradientScheduler
    memory: MemoryPlan  # what each part may take
    engines: Engines | None = None  # whose health is watched
    ended: Callable[[], None] = lambda: None  # called at the end of every call


@dataclass(frozen=True)
class CallSettings:
    """What holds for every call, on all listeners."""

    drain: Drain
    telemetry: Telemetry
    ended: Callable[[], None]  # called at the end of every call
    call_seconds: float  # most time of a call
    stream_seconds: float  # most time of a call that streams both ways


@dataclass(frozen=True)
class ListenerSettings:
    """Whom one listener lets in, and for how much."""

    authenticator: Authenticator | None  # None: anybody may call, as for enrolment
    rate_limiter: RateLimiter  # what each caller may take
    limit: ConcurrencyLimit  # calls at once
    room: Budget  # bytes of all messages that are worked on
    bounds: MessageBounds
    # Most tokens of a message's texts, by the name of the method; empty where tokens are not counted.
    tokens: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class ModelSettings:
    """What every RPC of the model uses."""

    catalog: Catalog
    reader: PromptReader
    rate_limiter: RateLimiter
    calls: CallSettings
