"""The endpoint as an operation: it runs in the agent where there is one, else in the command's process."""

from __future__ import annotations

from dataclasses import dataclass

from perfit_device.operations.endpoint import EndpointToken
from perfit_device.operations.operation import Emit, Event, Performer, Service
from perfit_shared.errors import ConfigError

__all__ = ["Serve", "Serving"]


@dataclass(frozen=True)
class Serving(Event):
    """Apps may call from here on."""

    url: str
    token: str


@dataclass(frozen=True)
class Serve(Service[None]):
    """Serve apps until the caller leaves. While the agent is locked, apps get 503."""

    host: str
    port: int  # 0: any free one
    hosts: tuple[str, ...] = ()  # as in `Rules`
    origins: tuple[str, ...] = ()
    new_token: bool = False

    def serve(self, performer: Performer, emit: Emit) -> None:
        try:
            from perfit_device.openai_api.guard import Rules
            from perfit_device.openai_api.server import Endpoint, EndpointSettings
        except ImportError as error:
            raise ConfigError("this needs more packages: pip install 'perfit[openai]'") from error
        settings = EndpointSettings(self.host, self.port, Rules(hosts=self.hosts, origins=self.origins))
        token = performer.perform(EndpointToken(new=self.new_token)).text
        with Endpoint(performer, settings, token) as endpoint:
            emit(Serving(endpoint.url, token))
            endpoint.wait()
