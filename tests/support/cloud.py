"""A server in this process, and the means to talk to it: for the tests of the service."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from perfit_cloud.config import CloudConfig
from perfit_cloud.engine.interface import GenerationSettings, ShiftUse
from perfit_cloud.model.artefacts import Artefact
from perfit_cloud.service.identity.authority import Authority
from perfit_cloud.service.identity.certificates import identity_of
from perfit_cloud.service.sealing.keys import ReplicaKeys
from perfit_cloud.service.server import CloudServer
from perfit_device.cloud.identity import Enrolment, Identity
from perfit_shared.types import Mode
from perfit_shared.wire import personalization_pb2 as pb
from perfit_shared.wire import personalization_pb2_grpc as pb_grpc
from tests.support.authority import csr_of, new_key
from tests.support.models import random_shift

SETTINGS = GenerationSettings(cache_tokens=2048, batch_tokens=64, max_requests=8)
TIMEOUT = 30
INVALID = "INVALID_ARGUMENT"


def own_keys(authority: Authority) -> ReplicaKeys:
    """A server's sealing keys, as `serve` makes them."""
    return ReplicaKeys(authority.certify_sealing_key, life_seconds=3600)


@dataclass
class Running:
    """A server in this process, and the means to talk to it."""

    config: CloudConfig
    authority: Authority
    server: CloudServer
    channels: list[grpc.Channel] = field(default_factory=list)

    @property
    def address(self) -> str:
        return self.server.addresses.address

    @property
    def front_address(self) -> str:
        """Where sealed calls alone are taken."""
        return self.server.front_address

    def enrolled(self, address: str) -> Enrolment:
        """A device's, that dials this address."""
        identity = Identity.create()
        return Enrolment(
            identity=identity,
            certificate=self.authority.enroll(self.invite(), identity.csr()),
            server_ca=self.authority.server_ca_der,
            address=address,
            enrolment_address=self.server.addresses.enrol_address,
            cloud_id=self.authority.cloud_id,
        )

    def invite(self) -> bytes:
        return self.authority.invite(60)[0]

    def enrolment(self) -> grpc.Channel:
        roots = pem(self.authority.server_ca_der)
        return self.open(self.server.addresses.enrol_address, grpc.ssl_channel_credentials(roots))

    def open(self, address: str, credentials: grpc.ChannelCredentials) -> grpc.Channel:
        channel = grpc.secure_channel(address, credentials, options=[("grpc.enable_http_proxy", 0)])
        self.channels.append(channel)
        return channel

    def device(self, key: ec.EllipticCurvePrivateKey | None = None) -> Device:
        key = key or new_key()
        der = self.authority.enroll(self.invite(), csr_of(key))
        return self.with_certificate(key, der)

    def with_certificate(self, key: ec.EllipticCurvePrivateKey, der: bytes) -> Device:
        credentials = grpc.ssl_channel_credentials(pem(self.authority.server_ca_der), key_pem(key), pem(der))
        return Device(key, der, self.open(self.address, credentials))


@dataclass
class Device:
    key: ec.EllipticCurvePrivateKey
    certificate: bytes
    channel: grpc.Channel

    @property
    def identity(self) -> str:
        return identity_of(x509.load_der_x509_certificate(self.certificate))

    @property
    def stub(self) -> pb_grpc.PersonalizationStub:
        return pb_grpc.PersonalizationStub(self.channel)

    def describe(self) -> pb.DescribeResponse:
        return self.stub.Describe(pb.DescribeRequest(), timeout=TIMEOUT)


def pem(der: bytes) -> bytes:
    return x509.load_der_x509_certificate(der).public_bytes(serialization.Encoding.PEM)


def key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def failure(call: Callable[[], object]) -> tuple[str, dict[str, str], str]:
    """(status name, our trailing metadata, message) of a call that must fail."""
    with pytest.raises(grpc.RpcError) as caught:
        call()
    error: Any = caught.value
    metadata = {key: value for key, value in error.trailing_metadata() or () if key.startswith("perfit-")}
    return error.code().name, metadata, error.details()


def personal(artefact: Artefact, seed: int = 1) -> tuple[pb.Shift, ShiftUse]:
    tensors = random_shift(artefact.spec, artefact.spec.personal_rank, seed)
    message = pb.Shift(
        mode=pb.SHIFT_MODE_PERSONAL,
        artefact=artefact.name,
        version=artefact.version,
        personal=tensors.to_bytes(),
    )
    return message, ShiftUse(Mode.PERSONAL, artefact, tensors)


BASE = pb.Shift(mode=pb.SHIFT_MODE_BASE)


def generate(text: str = "the cat sat", shift: pb.Shift = BASE, **sampling: Any) -> pb.GenerateRequest:
    sampling = {"max_new_tokens": 12, **sampling}
    return pb.GenerateRequest(prompt=pb.Prompt(text=text), shift=shift, sampling=pb.Sampling(**sampling))
