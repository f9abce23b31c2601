"""Servers in this process that are one cloud: one enrols, the others have no CA key."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from perfit_cloud.config import CloudConfig
from perfit_cloud.service.identity.authenticator import Authenticator
from perfit_cloud.service.identity.authority import Authority
from perfit_cloud.service.identity.server_files import ServerFiles
from perfit_cloud.service.server import CloudServer
from perfit_cloud.service.server_renewal import ServerRenewal
from perfit_cloud.service.settings import EnrolmentParts, ServerParts
from perfit_shared.wire import enrollment_pb2_grpc as enrol_grpc
from tests.support.authority import DAY
from tests.support.cloud import SETTINGS, Running

NAMES = ["localhost", "127.0.0.1"]


class Fleet:
    """`enrolling` has no model; each of `replicas` has a state folder of its own."""

    def __init__(self, folder: Path, database: str, make_parts: Callable[..., ServerParts]) -> None:
        self.folder, self.database, self._make_parts = folder, database, make_parts
        self._closes: list[Callable[[], object]] = []
        self.authority = Authority(
            folder / "ca", certificate_seconds=DAY, lapse_seconds=DAY, database=database, refuse_after=30
        )
        self._closes.append(self.authority.close)
        config = self._config("ca", roles=("enrolment",), public_address="127.0.0.1:1")
        self.enrolling = CloudServer(
            config, EnrolmentParts(authenticator=self.authority, issuer=self.authority)
        )
        self._start(self.enrolling)
        self.replicas: list[Running] = []

    def _config(self, name: str, **change: Any) -> CloudConfig:
        return CloudConfig(
            state=self.folder / name,
            address="127.0.0.1:0",
            enrol_address="127.0.0.1:0",
            drain_seconds=1,
            cache_tokens=SETTINGS.cache_tokens,
            database=self.database,
            **change,
        )

    def _start(self, server: CloudServer) -> None:
        server.start()
        self._closes.append(lambda: server.stop(0))

    def replica(
        self, roles: tuple[str, ...] = ("answers", "updates"), *, refuse_after: float = 30, **change: Any
    ) -> Running:
        name = f"replica{len(self.replicas)}"
        (self.folder / name).mkdir(mode=0o700)
        self.authority.write_serving_files(self.folder / name, NAMES)
        address = self.enrolling.addresses.enrol_address
        config = self._config(name, roles=roles, authority_address=address, **change)
        authenticator = Authenticator.open(config.state, database=self.database, refuse_after=refuse_after)
        self._closes.append(authenticator.close)
        server = CloudServer(config, self._make_parts(config, authenticator))
        self._start(server)
        self.replicas.append(Running(config, self.authority, server))
        return self.replicas[-1]

    def renewal(self, replica: Running) -> ServerRenewal:
        return ServerRenewal(ServerFiles(replica.config.state), self.enrolling.addresses.enrol_address)

    def enrolment(self) -> enrol_grpc.EnrollmentStub:
        running = Running(self.replicas[0].config, self.authority, self.enrolling)
        self._closes.append(lambda: [channel.close() for channel in running.channels])
        return enrol_grpc.EnrollmentStub(running.enrolment())

    def close(self) -> None:
        for running in self.replicas:
            for channel in running.channels:
                channel.close()
        for close in reversed(self._closes):
            close()
