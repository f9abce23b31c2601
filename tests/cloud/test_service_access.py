"""Who may call, over real TLS: certificates, revocation, enrolment and renewal."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import grpc
import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tests.support.authority import csr_of, new_key
from tests.support.cloud import TIMEOUT, Running, failure, generate, key_pem, pem
from tests.support.doubles import Drip, describe

from perfit_cloud.service.identity.authority import Authority
from perfit_shared.wire import enrollment_pb2 as enrol_pb
from perfit_shared.wire import enrollment_pb2_grpc as enrol_grpc

# -- who may call --------------------------------------------------------------------------------


def test_nobody_calls_without_a_certificate(run: Callable[..., Running]) -> None:
    running = run()
    roots = pem(running.authority.server_ca_der)
    channel = running.open(running.address, grpc.ssl_channel_credentials(roots))
    assert failure(describe(channel))[0] == "UNAVAILABLE"
    plain = grpc.insecure_channel(running.address)
    assert failure(describe(plain))[0] == "UNAVAILABLE"
    plain.close()


def test_handshakes_are_given_a_certificate_only_when_it_is_another(
    run: Callable[..., Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given one at every handshake, gRPC freed what others of that moment used, and the server died."""
    given: list[bytes] = []
    make = grpc.ssl_server_certificate_configuration

    def counted(pairs: Sequence[tuple[bytes, bytes]], root_certificates: bytes | None = None) -> Any:
        given.append(pairs[0][1])
        return make(pairs, root_certificates)

    monkeypatch.setattr(grpc, "ssl_server_certificate_configuration", counted)
    running = run()
    assert len(given) == 2  # one a listener
    for _ in range(3):
        running.device().describe()
    assert len(given) == 2
    identity = running.server._credentials._identity
    running.server._credentials._identity = replace(identity, renew_at=0.0)
    running.device().describe()
    running.device().describe()
    assert len(given) == 3
    assert given[2] != given[0]


def test_certificates_of_another_cloud_are_refused(run: Callable[..., Running]) -> None:
    running, other = run(), run()
    foreign = other.device()
    assert foreign.describe().cloud_id == other.authority.cloud_id
    assert failure(describe(running.with_certificate(foreign.key, foreign.certificate).channel))[0] == (
        "UNAVAILABLE"
    )


def test_server_certificate_is_no_device(run: Callable[..., Running]) -> None:
    running = run()
    identity = running.authority.server_identity(["localhost"])
    credentials = grpc.ssl_channel_credentials(
        pem(running.authority.server_ca_der), identity.key_pem, identity.certificate_pem
    )
    assert failure(describe(running.open(running.address, credentials)))[0] == "UNAVAILABLE"


def test_device_trusts_its_own_cloud_only(run: Callable[..., Running]) -> None:
    running, other = run(), run()
    device = running.device()
    credentials = grpc.ssl_channel_credentials(
        pem(running.authority.server_ca_der), key_pem(device.key), pem(device.certificate)
    )
    assert failure(describe(running.open(other.address, credentials)))[0] == "UNAVAILABLE"


@pytest.mark.parametrize("root", ["server CA", "device CA"])
def test_device_cannot_pose_as_a_server(run: Callable[..., Running], root: str) -> None:
    running = run()
    key = new_key()
    der = running.authority.enroll(running.invite(), csr_of(key, name="localhost", san="localhost"))
    credentials = grpc.ssl_server_credentials([(key_pem(key), pem(der))])
    impostor = grpc.server(ThreadPoolExecutor(1))
    port = impostor.add_secure_port("127.0.0.1:0", credentials)
    impostor.start()
    device_root = running.authority.device_ca_pem
    roots = pem(running.authority.server_ca_der) if root == "server CA" else device_root
    channel = running.open(f"localhost:{port}", grpc.ssl_channel_credentials(roots))
    assert failure(describe(channel))[0] == "UNAVAILABLE"
    impostor.stop(0)


def test_expired_on_an_open_channel_then_renewed(run: Callable[..., Running]) -> None:
    running = run(certificate_seconds=3)
    device = running.device()
    device.describe()
    time.sleep(4)
    status, metadata, details = failure(device.describe)
    assert (status, metadata) == ("UNAUTHENTICATED", {"perfit-code": "certificate_expired"})
    assert "renewed" in details
    # A new handshake does not get that far.
    fresh = running.with_certificate(device.key, device.certificate)
    assert failure(describe(fresh.channel))[0] == "UNAVAILABLE"
    stub = enrol_grpc.EnrollmentStub(running.enrolment())
    nonce = stub.Challenge(enrol_pb.ChallengeRequest()).nonce
    csr = csr_of(device.key)
    request = enrol_pb.RenewLapsedRequest(
        certificate=device.certificate,
        nonce=nonce,
        csr=csr,
        signature=device.key.sign(b"perfit-renew-v1" + nonce + csr, ec.ECDSA(hashes.SHA256())),
    )
    renewed = running.with_certificate(device.key, stub.RenewLapsed(request).certificate)
    assert renewed.identity == device.identity
    renewed.describe()


def test_revoked_on_an_open_channel(run: Callable[..., Running]) -> None:
    running = run()
    device, other = running.device(), running.device()
    device.describe()
    second = Authority(running.config.state, certificate_seconds=9, lapse_seconds=9)  # as another process
    second.revoke(device.identity)
    running.authority.refresh()  # as it does by itself twice a second
    status, metadata, _ = failure(device.describe)
    assert (status, metadata) == ("PERMISSION_DENIED", {"perfit-code": "identity_revoked"})
    assert failure(lambda: list(device.stub.Generate(generate())))[0] == "PERMISSION_DENIED"
    health = health_pb2_grpc.HealthStub(device.channel)
    assert failure(lambda: health.Check(health_pb2.HealthCheckRequest()))[0] == "PERMISSION_DENIED"
    renew = enrol_grpc.IdentityStub(device.channel)
    request = enrol_pb.RenewRequest(csr=csr_of(device.key))
    assert failure(lambda: renew.Renew(request))[0] == "PERMISSION_DENIED"
    other.describe()


def test_revoked_between_messages_of_a_stream(run: Callable[..., Running]) -> None:
    drip = Drip()
    running = run(engine=drip)
    device = running.device()
    stream = device.stub.Generate(generate(), timeout=TIMEOUT)
    drip.go.release()
    assert next(stream).text == "word "
    running.authority.revoke(device.identity)
    drip.go.release()
    status, metadata, _ = failure(lambda: next(stream))
    assert (status, metadata) == ("PERMISSION_DENIED", {"perfit-code": "identity_revoked"})
    assert drip.cancelled.wait(TIMEOUT)


def test_expired_between_messages_of_a_stream(
    run: Callable[..., Running], wrong_clock: Callable[[float], None]
) -> None:
    drip = Drip()
    device = run(engine=drip, certificate_seconds=60).device()
    stream = device.stub.Generate(generate(), timeout=TIMEOUT)
    drip.go.release()
    next(stream)
    wrong_clock(61)
    drip.go.release()
    assert failure(lambda: next(stream))[:2] == ("UNAUTHENTICATED", {"perfit-code": "certificate_expired"})


# -- enrolment over the wire ---------------------------------------------------------------------


def test_enrolment_and_renewal(run: Callable[..., Running]) -> None:
    running = run()
    stub, key, secret = enrol_grpc.EnrollmentStub(running.enrolment()), new_key(), running.invite()
    request = enrol_pb.EnrollRequest(secret=secret, csr=csr_of(key))
    credentials = stub.Enroll(request, timeout=TIMEOUT)
    assert credentials == stub.Enroll(request, timeout=TIMEOUT)  # replies get lost
    assert credentials.server_ca == running.authority.server_ca_der
    assert (credentials.address, credentials.cloud_id) == (running.address, running.authority.cloud_id)
    device = running.with_certificate(key, credentials.certificate)
    device.describe()
    other = enrol_pb.EnrollRequest(secret=secret, csr=csr_of(new_key()))
    status, metadata, details = failure(lambda: stub.Enroll(other))
    assert (status, metadata) == ("PERMISSION_DENIED", {"perfit-code": "invite_refused"})
    assert "ask the operator" in details
    fresh = new_key()
    renewed = enrol_grpc.IdentityStub(device.channel).Renew(enrol_pb.RenewRequest(csr=csr_of(fresh)))
    again = running.with_certificate(fresh, renewed.certificate)
    assert again.identity == device.identity
    again.describe()
    bad = enrol_pb.RenewRequest(csr=b"x")
    assert failure(lambda: enrol_grpc.IdentityStub(again.channel).Renew(bad))[1] == {
        "perfit-code": "invalid_input"
    }


def test_enrolment_listener_serves_enrolment_only(run: Callable[..., Running]) -> None:
    running = run()
    assert failure(describe(running.enrolment()))[0] == "UNIMPLEMENTED"
    enrol = enrol_grpc.EnrollmentStub(running.device().channel)
    assert failure(lambda: enrol.Challenge(enrol_pb.ChallengeRequest()))[0] == "UNIMPLEMENTED"
